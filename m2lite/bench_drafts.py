"""Which drafts pay on this machine: every setting on every workload, alternating. Measures, decides nothing."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m2lite import __version__, machine
from m2lite.api import Model
from m2lite.drafting.drafted import Drafted
from m2lite.engine.runner import Stop
from m2lite.errors import UsageError
from m2lite.sampling.draw import Sampling
from m2lite.shown import shown
from m2lite.text.template import encode_chat
from m2lite.workloads import WORKLOADS, Workload

SAID = "the replies of this workload are given; the model computes them and verifies drafts against them"


class Setting(NamedTuple):
    """How a session drafts."""

    mode: str
    n_tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.mode} {self.n_tokens}" if self.n_tokens else self.mode


def settings_of(model: Model) -> list[Setting]:
    """off, prompt lookup and as many modules as there are, with 1 to 3 drafts each, and auto."""
    lookup = [Setting("ngram", k) for k in (1, 2, 3)]
    modules = [Setting("mtp", k) for k in range(1, min(3, model.runner.drafting.n_modules) + 1)]
    return [Setting("off"), *lookup, *modules, Setting("auto")]


class Run(NamedTuple):
    """All questions of a workload in one setting."""

    n_tokens: int  # decoded; the first of each answer comes with its prompt
    seconds: float
    drafted: Drafted

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / max(self.seconds, 1e-9)  # no time where every answer ended with its first token


def bench_drafts(
    model: Model,
    repeats: int,
    *,
    max_tokens: int,
    note: Callable[[str], None],
    stop: Stop,
    workloads: Sequence[Workload] = WORKLOADS,
) -> dict[str, Any]:
    """What every setting reached on every workload in `repeats` runs, or in fewer when `stop` says so.

    Each question is answered in all settings in turn before the next one is, so that a slow minute meets all of them; a
    first run is not counted. The answers are compared: they must be the same.
    """
    if model.runner.drafting.mode != "auto":
        raise UsageError("bench --draft compares all sources of drafts.", "Leave --draft off.")
    settings = settings_of(model)
    found: list[dict[str, Any]] = []
    for workload in workloads:
        runs: dict[Setting, list[Run]] = {s: [] for s in settings}
        for n in range(repeats + 1):
            note(f"{workload.name}: " + (f"run {n} of {repeats}" if n else "warming up"))
            once = _run(model, workload, settings, n, max_tokens, stop)
            if once is None:
                return {"model": str(model.path), "workloads": found}
            if n:
                for setting, run in once.items():
                    runs[setting].append(run)
        found.append(_result(workload, runs))
    return {
        "model": str(model.path),
        "size_bytes": model.gguf.size_bytes,
        "repeats": repeats,
        "max_tokens": max_tokens,
        "workloads": found,
        "threads": model.n_threads,
        "processor": machine.processor_name(),
        "version": __version__,
    }


def _run(
    model: Model, workload: Workload, settings: Sequence[Setting], n: int, max_tokens: int, stop: Stop
) -> dict[Setting, Run] | None:
    """Every question in every setting."""
    found = {s: Run(0, 0.0, Drafted()) for s in settings}
    for i, question in enumerate(workload.questions):
        prompt = encode_chat(model.tokenizer, model.template, [{"role": "user", "content": question}])
        script = model.tokenizer.encode(workload.replies[i]) if workload.replies else None
        answers: list[list[int]] = []
        # By lot: who always follows the same setting would find what that one left in the caches.
        for setting in random.Random(1000 * n + i).sample(settings, len(settings)):
            # Without `keep` each setting reads the prompt itself, and so do its modules.
            options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "script": script, "keep": False}
            sampling = Sampling(temperature=workload.temperature, seed=1000 * n + i)
            with model.session(*setting) as session:
                answers.append(list(session.generate(prompt, sampling=sampling, **options)))
                if session.finish_reason == "interrupted":
                    return None
                stats = session.stats
            assert answers[-1] == answers[0], f"{setting} changed the answer to {question!r}"
            before = found[setting]
            if stats.drafted is not None:
                before.drafted.include(stats.drafted)
            n_tokens = before.n_tokens + stats.n_generated - 1 + (session.finish_reason == "stop")
            found[setting] = Run(n_tokens, before.seconds + stats.decode_s, before.drafted)
    return found


def _result(workload: Workload, runs: dict[Setting, list[Run]]) -> dict[str, Any]:
    plain, rows = runs[Setting("off")], list[dict[str, Any]]()
    for setting, samples in runs.items():
        drafted = Drafted()
        for run in samples:
            drafted.include(run.drafted)
        ratios = [run.tokens_per_s / max(off.tokens_per_s, 1e-9) for run, off in zip(samples, plain, strict=True)]
        rows.append(
            {
                "setting": str(setting),
                "tokens_per_s": statistics.median(run.tokens_per_s for run in samples),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "draft": drafted.as_dict(),
            }
        )
    note = {"note": SAID} if workload.replies else {}
    return {"name": workload.name, "temperature": workload.temperature, "settings": rows, **note}


def format_drafts(result: dict[str, Any]) -> str:
    lines = [
        f"{shown(result['model'])}, {result['threads']} threads, {result['repeats']} runs; medians of the ratios to off"
    ]
    for workload in result["workloads"]:
        lines.append("")
        lines.append(f"{workload['name']}, temperature {workload['temperature']:g}")
        if "note" in workload:
            lines.append(f"({workload['note']})")
        for row in workload["settings"]:
            draft = row["draft"]
            line = f"  {row['setting']:<8}{row['tokens_per_s']:>9.1f} tok/s  x{row['ratio']:.3f}"
            if draft["steps"]:
                line += f"  {draft['tokens_per_step']:.2f} tok/step"
            if draft["proposed"]:
                shares = " ".join("-" if a is None else f"{a:.0%}" for a in draft["acceptance"])
                line += f"  right {shares}  ({', '.join(f'{k} {n}' for k, n in draft['sources'].items())} steps)"
            lines.append(line)
    return "\n".join(lines)
