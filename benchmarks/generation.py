"""Compare prefill and decode speed of this project's engines with llama.cpp, onnxruntime-genai and transformers.

    python benchmarks/prepare_peers.py                       # once: the peers' files
    python benchmarks/generation.py --build                  # once: our engines, from the same GGUF
    python benchmarks/generation.py --check                  # every engine's answer to one question
    python benchmarks/generation.py --rounds 5 --json build/bench/generation.json

The peers need `torch transformers gguf onnxruntime-genai llama-cpp-python`. Build llama-cpp-python from its source
(`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`, some minutes): the ready
wheels of llama.cpp stop at AVX2 and would be an unfair peer. Every engine runs in a fresh process in every round, in an
order shuffled for the round, on the same processors; the table shows medians over the rounds.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from engine_process import ENGINES, Job
from machine import describe_machine
from measurement import Workload
from model_files import BENCH_FOLDER, find_gguf

QUESTION = "What is the capital of France?"
METRICS = ("prefill", "decode_median", "decode_mean")
# Shown, but no peer to divide by: it answers the check question with gibberish. See prepare_peers.py.
OUTSIDE_RATIOS = {"genai int4, block 128"}
TIME_LIMIT_SECONDS = 900


def build_engines(gguf: Path, folder: Path) -> None:
    """Build our own engines from the published GGUF, unless they exist."""
    import trtllm

    for file, quantization in (("trtllm-fp32", None), ("trtllm-w4a16", "W4A16"), ("trtllm-w8a16", "W8A16")):
        if not (folder / file).exists():
            options = {"dequantize": True} if quantization is None else {"quantization": quantization}
            trtllm.compile(str(gguf), output_dir=str(folder / file), target="onnxruntime", **options)


def run_process(job: Job) -> dict:
    """Run a job in its own process; a failure comes back as {"error": ...} and does not end the comparison."""
    command = [sys.executable, str(Path(__file__).with_name("engine_process.py")), json.dumps(dataclasses.asdict(job))]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIME_LIMIT_SECONDS} s"}
    if finished.returncode:
        return {"error": (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]}
    return json.loads(finished.stdout.splitlines()[-1])


def available_engines(names: list[str], folder: Path) -> list[str]:
    """Drop the engines whose files are missing, and say so."""
    missing = [name for name in names if not (folder / ENGINES[name][1]).exists()]
    for name in missing:
        print(f"skipped: {name}: {folder / ENGINES[name][1]} does not exist", file=sys.stderr)
    return [name for name in names if name not in missing]


def check_texts(names: list[str], arguments: argparse.Namespace) -> None:
    """Print every engine's greedy answer to one question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "hf-fp32")
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    workload = Workload(1, len(prompt), 24, 1, arguments.threads, arguments.seed)
    for name in names:
        result = run_process(Job(name, str(arguments.folder), workload, prompt))
        print(f"{name}: {result.get('error') or repr(tokenizer.decode(result['tokens']))}", flush=True)


def run_rounds(names: list[str], arguments: argparse.Namespace) -> dict:
    """Return {batch: {engine: [one result per round]}}."""
    results = {batch: {name: [] for name in names} for batch in arguments.batches}
    for round_number in range(arguments.rounds):
        order = [(name, batch) for name in names for batch in arguments.batches]
        random.Random(f"{arguments.seed}/{round_number}").shuffle(order)
        for name, batch in order:
            seed = arguments.seed + round_number
            shape = (batch, arguments.prompt_length, arguments.new_tokens, arguments.repeats, arguments.threads, seed)
            result = run_process(Job(name, str(arguments.folder), Workload(*shape)))
            results[batch][name].append(result)
            shown = result.get("error") or " ".join(f"{metric} {result[metric]:.1f}" for metric in METRICS)
            print(f"round {round_number + 1}, batch {batch}, {name}: {shown}", file=sys.stderr, flush=True)
    return results


def summarize(rounds: dict[str, list[dict]]) -> dict:
    """Reduce an engine's rounds to medians, and add the ratios to the best peer of each column."""
    summary = {}
    for name, results in rounds.items():
        good = [result for result in results if "error" not in result]
        if good:
            summary[name] = {metric: statistics.median(result[metric] for result in good) for metric in METRICS}
            summary[name]["rounds"] = len(good)
    outside = OUTSIDE_RATIOS | {name for name, (kind, _) in ENGINES.items() if kind == "trtllm"}
    peers = [medians for name, medians in summary.items() if name not in outside]
    for medians in summary.values():
        for metric in METRICS if peers else ():
            medians[f"{metric}_ratio"] = medians[metric] / max(peer[metric] for peer in peers)
    return summary


def markdown_table(batch: int, summary: dict) -> str:
    """Draw one batch size, fastest decode first."""
    lines = [
        f"Batch {batch}",
        "",
        "| engine | prefill tok/s | decode tok/s, median step | mean | prefill ratio | decode ratio | rounds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(summary.items(), key=lambda item: -item[1]["decode_median"]):
        rates = " | ".join(f"{row[metric]:.1f}" for metric in METRICS)
        ratios = " | ".join(
            f"{row[key]:.2f}" if key in row else "-" for key in ("prefill_ratio", "decode_median_ratio")
        )
        lines.append(f"| {name} | {rates} | {ratios} | {row['rounds']} |")
    return "\n".join(lines)


def report(results: dict, arguments: argparse.Namespace) -> None:
    """Print machine and tables; write everything, the single rounds too, as JSON when asked."""
    machine = describe_machine()
    summaries = {batch: summarize(rounds) for batch, rounds in results.items()}
    print(f"{machine['processor']}, {', '.join(machine['instruction_sets'])}, {arguments.threads} threads")
    print(", ".join(f"{name} {version}" for name, version in machine["packages"].items()))
    print(f"prompt {arguments.prompt_length}, new {arguments.new_tokens}; ratios are to the best peer of the column")
    print(f"shown but not divided by, its text is broken: {', '.join(sorted(OUTSIDE_RATIOS))}")
    for batch, summary in summaries.items():
        print("\n" + markdown_table(batch, summary))
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("folder", "json", "gguf")}
        content = {"machine": machine, "settings": settings, "summary": summaries, "rounds": results}
        arguments.json.write_text(json.dumps(content, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="build this project's engines, then stop")
    parser.add_argument("--check", action="store_true", help="print every engine's answer to a question, then stop")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="generations in each process, after one that warms up")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", help="the published GGUF for --build (default: found in the model cache)")
    parser.add_argument("--folder", type=Path, default=BENCH_FOLDER, help="where prepare_peers.py wrote")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.build:
        build_engines(find_gguf(arguments.gguf), arguments.folder)
        return
    names = available_engines(arguments.engines, arguments.folder)
    if arguments.check:
        check_texts(names, arguments)
    else:
        report(run_rounds(names, arguments), arguments)


if __name__ == "__main__":
    main()
