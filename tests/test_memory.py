"""Reading the machine's and the control groups' memory, and sizes as people write them."""

import pytest

from trtllm.errors import UsageError
from trtllm.memory import available_memory, peak_memory, resident_memory
from trtllm.sizes import format_size, parse_size


@pytest.fixture
def machine(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    return proc, groups


def test_the_machine_alone_limits_where_there_are_no_groups(machine):
    proc, groups = machine
    assert available_memory(proc=proc, cgroups=groups) == 8000 * 1024


def test_the_tightest_group_of_version_two_counts_and_cache_is_free(machine):
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    for name, limit in (("outer", "1000000"), ("outer/inner", "max")):
        (groups / name).mkdir()
        (groups / name / "memory.max").write_text(limit + "\n")
        (groups / name / "memory.current").write_text("600000\n")
        (groups / name / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available_memory(proc=proc, cgroups=groups) == 450_000


def test_a_group_of_version_one_in_a_container_is_found_at_the_root(machine):
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("4:memory:/outside/of/the/container\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("2000000")
    (groups / "memory" / "memory.usage_in_bytes").write_text("1500000")
    assert available_memory(proc=proc, cgroups=groups) == 500_000


def test_without_any_file_nothing_is_known(tmp_path):
    assert available_memory(proc=tmp_path, cgroups=tmp_path) is None


def test_this_process_has_memory():
    assert 0 < resident_memory() <= peak_memory() * 1.05


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("3GB", 3 * 10**9), ("512MiB", 512 << 20), ("1.5g", 1_500_000_000), ("1000", 1000), ("2 kib", 2048)],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "3 parsecs", "0", "1e9"])
def test_nonsense_is_no_size(text):
    with pytest.raises(UsageError):
        parse_size(text)


def test_sizes_are_written_with_three_digits():
    sizes = (0, 999, 1000, 158_981_763, 999_600_000, 4_660_000_000)
    assert [format_size(size) for size in sizes] == ["0 bytes", "999 bytes", "1 kB", "159 MB", "1 GB", "4.66 GB"]
