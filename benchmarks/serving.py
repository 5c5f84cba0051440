"""Compare how fast engines serve many requests: in-flight batching against llama.cpp's and static batches.

    python benchmarks/prepare_peers.py                            # once: the peers' files
    python benchmarks/serving.py --build                          # once: our engine, from the same GGUF
    python benchmarks/serving.py --check                          # every engine's answer amid other requests
    python benchmarks/serving.py --rounds 5 --json build/bench/serving.json
    python benchmarks/serving.py --rate 1.0 --json build/bench/serving-online.json
    python benchmarks/serving.py --prefix                         # time to the first token with a shared prompt
    python benchmarks/serving.py --overhead                       # what our executor adds to a step
    python benchmarks/serving.py --tune --rounds 3                # which settings of llama.cpp are its fastest

The peers are those of generation.py; they may live in another environment, `--peer-python` names its interpreter. A
native llama.cpp server takes part when `llama-server` is on the path or named by `--llama-server`. Every engine runs in
a fresh process in every round, in an order shuffled for the round, on the same processors; tables show medians.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from machine import describe_machine
from model_files import BENCH_FOLDER, find_gguf
from serving_process import CONTENDERS, LLAMA_VARIANTS, OUR_ENGINE, Job, Mode
from serving_workload import LONGEST_SEQUENCE, Mix

QUESTION = "What is the capital of France?"
# Shown, but no peer to divide by: its graph attends to the padding of a batch, which spoils the shorter rows' text.
OUTSIDE_RATIOS = {"genai int4, static 8"}
TIME_LIMIT_SECONDS = 1800
STATIC_KINDS = ("genai", "transformers")
IN_FLIGHT_KINDS = ("inflight", "llama", "llama-server")
ALL_KINDS = (*IN_FLIGHT_KINDS, "one by one", *STATIC_KINDS)


@dataclasses.dataclass(frozen=True)
class Table:
    """What a mode shows: which kinds of contenders, which columns, and the metrics whose ratio to the best peer."""

    kinds: tuple[str, ...]
    columns: dict[str, str]
    ratios: tuple[str, ...]
    more_is_better: bool


TABLES: dict[Mode, Table] = {
    "throughput": Table(
        ALL_KINDS,
        {"generated_rate": "new tok/s", "total_rate": "all tok/s", "makespan": "makespan, s"},
        ("generated_rate",),
        True,
    ),
    "online": Table(
        IN_FLIGHT_KINDS,
        {
            "ttft_p50": "first token p50, ms",
            "ttft_p99": "p99",
            "itl_p50": "between tokens p50, ms",
            "itl_p99": "p99",
            "generated_rate": "new tok/s",
        },
        ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99"),
        False,
    ),
    "prefix": Table(
        IN_FLIGHT_KINDS,
        {"first_ttft": "first request, ms", "second_ttft": "second request, ms"},
        ("first_ttft", "second_ttft"),
        False,
    ),
    "overhead": Table(
        ("inflight",),
        {"overhead_median": "share outside the session", "overhead_p99": "p99", "iteration_ms": "step, ms"},
        (),
        False,
    ),
}


def build_engine(gguf: Path, folder: Path) -> None:
    """Build our engine for 16 sequences from the published GGUF, unless it exists."""
    import trtllm

    if not (folder / OUR_ENGINE).exists():
        config = trtllm.BuildConfig(
            target="onnxruntime",
            quantization="W4A16",
            max_batch_size=16,
            max_input_len=LONGEST_SEQUENCE - 1,
            max_seq_len=LONGEST_SEQUENCE,
        )
        trtllm.compile(str(gguf), output_dir=str(folder / OUR_ENGINE), config=config)


def run_process(job: Job, arguments: argparse.Namespace) -> dict:
    """Run a job in its own process; a failure comes back as {"error": ...} and does not end the comparison."""
    contender = (CONTENDERS | LLAMA_VARIANTS)[job.contender]
    interpreter = sys.executable if contender.is_ours else arguments.peer_python
    script = Path(__file__).with_name("serving_process.py")
    command = [interpreter, str(script), json.dumps(dataclasses.asdict(job))]
    # A session of its own, so that a server which the process has started ends with it.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=TIME_LIMIT_SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return {"error": f"took longer than {TIME_LIMIT_SECONDS} s"}
        raise
    if process.returncode:
        return {"error": (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]}
    return json.loads(output.splitlines()[-1])


def make_job(name: str, mode: Mode, seed: int, arguments: argparse.Namespace) -> Job:
    """Return the job of a contender in a mode."""
    mix = Mix(arguments.requests, seed, arguments.rate)
    job = Job(name, mode, str(arguments.folder), mix, arguments.threads, arguments.llama_server or "")
    return dataclasses.replace(job, system_length=arguments.system_length)


def available_contenders(names: list[str], mode: Mode, arguments: argparse.Namespace) -> list[str]:
    """Drop the contenders that a mode has no use for, and those whose files are missing; say so of the latter."""
    kept = []
    for name in names:
        contender = (CONTENDERS | LLAMA_VARIANTS)[name]
        if mode != "check" and contender.kind not in TABLES[mode].kinds:
            continue
        if not (arguments.folder / contender.file).exists():
            print(f"skipped: {name}: {arguments.folder / contender.file} does not exist", file=sys.stderr)
        elif contender.kind == "llama-server" and not arguments.llama_server:
            print(f"skipped: {name}: no llama-server on the path, and no --llama-server", file=sys.stderr)
        else:
            kept.append(name)
    return kept


def check_texts(names: list[str], arguments: argparse.Namespace) -> None:
    """Print every engine's greedy answer to one question that is served among other requests."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.folder / "hf-fp32" / "tokenizer.json"))
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    for name in names:
        job = dataclasses.replace(make_job(name, "check", arguments.seed, arguments), check_prompt=prompt)
        result = run_process(job, arguments)
        print(f"{name}: {result.get('error') or repr(tokenizer.decode(result['tokens']))}", flush=True)


def run_rounds(names: list[str], mode: Mode, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Return {contender: [one result per round]}; a round has one seed, so all contenders serve the same requests."""
    results: dict[str, list[dict]] = {name: [] for name in names}
    for round_number in range(arguments.rounds):
        order = list(names)
        random.Random(f"{arguments.seed}/{round_number}").shuffle(order)
        for name in order:
            result = run_process(make_job(name, mode, arguments.seed + round_number, arguments), arguments)
            results[name].append(result)
            shown = result.get("error") or " ".join(f"{key} {result[key]:.4g}" for key in TABLES[mode].columns)
            print(f"round {round_number + 1}, {name}: {shown}", file=sys.stderr, flush=True)
    return results


def summarize(results: dict[str, list[dict]], table: Table) -> dict[str, dict]:
    """Reduce a contender's rounds to medians, and add the ratios to the best peer: above 1 is better than it."""
    summary: dict[str, dict] = {}
    for name, rounds in results.items():
        good = [result for result in rounds if "error" not in result]
        if good:
            summary[name] = {metric: statistics.median(result[metric] for result in good) for metric in table.columns}
            summary[name]["rounds"] = len(good)
    outside = OUTSIDE_RATIOS | {name for name, contender in CONTENDERS.items() if contender.is_ours}
    peers = [row for name, row in summary.items() if name not in outside]
    for row in summary.values():
        for metric in table.ratios if peers else ():
            if table.more_is_better:
                row[f"{metric}_ratio"] = row[metric] / max(peer[metric] for peer in peers)
            else:
                row[f"{metric}_ratio"] = min(peer[metric] for peer in peers) / row[metric]
    return summary


def markdown_table(summary: dict[str, dict], table: Table) -> str:
    """Draw a mode's table, the best of its first column first."""
    ratios = [f"{metric}_ratio" for metric in table.ratios if all(f"{metric}_ratio" in row for row in summary.values())]
    heads = [*table.columns.values(), *(f"{table.columns[key.removesuffix('_ratio')]}: ratio" for key in ratios)]
    lines = [f"| engine | {' | '.join(heads)} | rounds |", "|---" + "|---:" * (len(heads) + 1) + "|"]
    order = next(iter(table.columns))
    for name, row in sorted(summary.items(), key=lambda item: item[1][order], reverse=table.more_is_better):
        cells = [f"{row[metric]:.1%}" if "overhead" in metric else f"{row[metric]:.1f}" for metric in table.columns]
        cells += [f"{row[key]:.2f}" for key in ratios]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['rounds']} |")
    return "\n".join(lines)


def peer_packages(arguments: argparse.Namespace) -> dict:
    """Return the versions of the packages that the peers' interpreter sees."""
    code = "import json, machine; print(json.dumps(dict(machine.installed_packages())))"
    command = [arguments.peer_python, "-c", code]
    return json.loads(subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parent).stdout)


def report(results: dict[str, list[dict]], mode: Mode, arguments: argparse.Namespace) -> None:
    """Print machine and table; write everything, the single rounds too, as JSON when asked."""
    machine = describe_machine() | {"peer_packages": peer_packages(arguments)}
    summary = summarize(results, TABLES[mode])
    print(f"{machine['processor']}, {', '.join(machine['instruction_sets'])}, {arguments.threads} threads")
    for key in ("packages", "peer_packages"):
        print(f"{key}: " + ", ".join(f"{name} {version}" for name, version in machine[key].items()))
    arrivals = "all at once" if arguments.rate is None else f"{arguments.rate} a second"
    print(f"{mode}: {arguments.requests} requests, {arrivals}, {arguments.rounds} rounds\n")
    print(markdown_table(summary, TABLES[mode]))
    if arguments.json:
        hidden = ("folder", "json", "gguf", "peer_python", "llama_server")
        settings = {key: value for key, value in vars(arguments).items() if key not in hidden}
        content = {"mode": mode, "machine": machine, "settings": settings, "summary": summary, "rounds": results}
        arguments.json.write_text(json.dumps(content, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--build", action="store_true", help="build this project's engine, then stop")
    modes.add_argument("--check", action="store_true", help="print every engine's answer to a question, then stop")
    modes.add_argument("--prefix", action="store_true", help="time to first token with a shared system prompt")
    modes.add_argument("--overhead", action="store_true", help="what the executor adds to a step of 8 requests")
    modes.add_argument("--tune", action="store_true", help="throughput of llama.cpp under its settings")
    modes.add_argument("--rate", type=float, help="Poisson arrivals, so many a second, and latencies")
    parser.add_argument("--engines", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--system-length", type=int, default=1000, help="tokens of the system prompt of --prefix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers (default: this one)")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="default: the one on the path")
    parser.add_argument("--gguf", help="the published GGUF for --build (default: found in the model cache)")
    parser.add_argument("--folder", type=Path, default=BENCH_FOLDER, help="where prepare_peers.py wrote")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def selected_mode(arguments: argparse.Namespace) -> Mode:
    """Return what the arguments ask to measure."""
    if arguments.check:
        return "check"
    if arguments.prefix:
        return "prefix"
    if arguments.overhead:
        return "overhead"
    return "throughput" if arguments.rate is None else "online"


def main() -> None:
    arguments = parse_arguments()
    if arguments.build:
        build_engine(find_gguf(arguments.gguf), arguments.folder)
        return
    mode = selected_mode(arguments)
    names = list(LLAMA_VARIANTS) if arguments.tune else arguments.engines or list(CONTENDERS)
    names = available_contenders(names, mode, arguments)
    if mode == "check":
        check_texts(names, arguments)
    else:
        report(run_rounds(names, mode, arguments), mode, arguments)


if __name__ == "__main__":
    main()
