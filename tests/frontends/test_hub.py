"""Hub ids: what is fetched, and what is said when it cannot be. No test reaches the network."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from trtllm.errors import BadInputError, UsageError
from trtllm.frontends.detect import open_model


class _Hub:
    """Stands for the hub: `files` of the one repository, whose snapshot is `directory`."""

    def __init__(self, files=(), directory=None, error=None, cached=True):
        self.files, self.directory, self.error, self.cached = files, directory, error, cached
        self.asked = []

    def model_info(self, repository, revision=None, timeout=None):
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repository, **options):
        self.asked.append((repository, options))
        if options.get("local_files_only") and not self.cached:
            raise LocalEntryNotFoundError("not there")
        return str(self.directory)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def install(**values):
        made = _Hub(**values)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return install


def _raised(error):
    """An error of the hub's library, without the HTTP response that its constructor wants."""
    return error.__new__(error)


def _refused(error, name, *words):
    with pytest.raises(error) as caught:
        open_model(name)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_a_model_is_fetched_and_read(hub, tiny_directory):
    made = hub(files=["config.json", "model.safetensors", "pytorch_model.bin"], directory=tiny_directory("llama"))
    heard = []
    checkpoint = open_model("org/name", notify=heard.append)
    assert checkpoint.source == "org/name"
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert "downloading org/name" in heard[0]
    patterns = made.asked[0][1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert "*.bin" not in patterns


def test_pytorch_files_are_fetched_when_there_are_no_others(hub, tiny_directory):
    made = hub(files=["config.json", "pytorch_model.bin", "onnx/model.safetensors"], directory=tiny_directory("llama"))
    open_model("org/name")
    assert "*.bin" in made.asked[0][1]["allow_patterns"]


def test_a_revision_follows_an_at_sign(hub, tiny_directory):
    made = hub(files=["model.safetensors"], directory=tiny_directory("llama"))
    open_model("org/name@v1.0")
    assert made.asked[0] == ("org/name", made.asked[0][1])
    assert made.asked[0][1]["revision"] == "v1.0"


def test_a_directory_of_that_name_comes_first(hub, tiny_directory, tmp_path):
    hub(error=AssertionError("asked the hub"))
    shutil.copytree(tiny_directory("qwen2"), tmp_path / "org" / "name")
    assert open_model("org/name").architecture == "Qwen2ForCausalLM"


def test_offline_the_cache_is_read(hub, tiny_directory):
    made = hub(error=ConnectionError("no network"), directory=tiny_directory("llama"))
    heard = []
    assert open_model("org/name", notify=heard.append).architecture == "LlamaForCausalLM"
    assert "cannot be reached" in heard[0]
    assert made.asked[0][1]["local_files_only"]


def test_offline_and_not_cached_is_said_so(hub):
    hub(error=ConnectionError("no network"), cached=False)
    _refused(BadInputError, "org/name", "org/name", "cannot be reached", "no path", "local copy")


def test_an_unknown_name_is_said_so(hub):
    hub(error=_raised(RepositoryNotFoundError))
    _refused(BadInputError, "org/name", "org/name", "no model of that name", "hf auth login")


def test_a_gated_model_is_said_so(hub):
    hub(error=_raised(GatedRepoError))
    _refused(BadInputError, "org/name", "gated", "hf auth login", "local copy")


def test_a_repository_of_gguf_files_tells_how_to_fetch_one(hub):
    hub(files=["README.md", "model-Q4_K_M.gguf"])
    _refused(UsageError, "org/name", "model-Q4_K_M.gguf", "hf download org/name")


def test_a_repository_without_weights_is_said_so(hub):
    hub(files=["README.md", "config.json"])
    _refused(BadInputError, "org/name", "no weights")


@pytest.mark.parametrize("name", ["/org/name", "./org/name", "a/b/c", "name", "../org/name", "org/", "org /name"])
def test_what_does_not_look_like_an_id_does_not_reach_the_hub(hub, name):
    hub(error=AssertionError("asked the hub"))
    _refused(BadInputError, name, "no model at")
