"""The report of one run: RUN/report.html."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rear_scale.evaluate.published import ROWS, TableRow, our_rows, published_row
from rear_scale.report.charts import Chart, Line, Mark, short
from rear_scale.report.curves import Curve
from rear_scale.report.page import Head, Picture, Section, Table, write_page
from rear_scale.report.reading import REPORT, RunFiles, Saved, Scored
from rear_scale.shards.crops import BadImage, decode_image

_MOST_SHEETS = 8
_MOST_FIGURES = 4  # of one analysis
_MOST_ROWS = 60  # of a table of events or starts
_MOST_SCORES = 24  # charts of scores during training
_AS_IT_IS_BYTES = 80_000  # pictures of at most this size are shown as they are
_PICTURE_WIDTH = 720  # pixels of the others
_LARGEST = 1e300  # of numbers that are shown
_LARGEST_PICTURE = 64 << 20  # bytes of a file that is opened

# Metrics that have a place of their own; every other number of metrics.jsonl is shown below them.
_TIMES = {
    "step_time_s": "whole step",
    "data_wait_s": "waiting for data",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "checkpoint_s": "checkpoint",
}
_KINDS = {
    "spike": "loss spikes, losses outside of the expected curve (red)",
    "skipped": "updates skipped (red)",
    "failed": "errors (red)",
    "rewind": "rewinds (yellow)",
    "stop": "preemption (yellow)",
    "start": "restarts (green)",
}
_EVENTS = {
    "loss_spike": "spike",
    "left_expected_curve": "spike",
    "nonfinite": "skipped",
    "checkpoint_failed": "failed",
    "refused": "failed",
}
_WORDS = {
    "loss_spike": "loss spike",
    "left_expected_curve": "loss outside of its expected curve",
    "nonfinite": "update not finite",
    "checkpoint_failed": "checkpoint not written",
    "refused": "start refused",
}


def write_report(folder: Path, files: RunFiles | None = None, out: Path | None = None) -> Path:
    """The path of the report of a run, which is written here. files: those that are read already; out: None = in the folder."""
    files = files or RunFiles(folder)
    path = out or folder / REPORT
    marks = marks_of(files)
    head = head_of(files, marks)
    write_page(path, files.name, sections_of(files, marks), head)  # the sections come last: they list what was not read
    return path


def sections_of(files: RunFiles, marks: Sequence[Mark]) -> list[Section]:
    """The sections of a report that have something to show."""
    sections = [
        *_curves(files, marks),
        _events(files),
        _sheets(files),
        _scores(files),
        _scores_in_training(files, marks),
        _analyses(files),
        _checkpoints(files),
        _starts(files),
        _config(files),
    ]
    if files.curves.left_out:
        files.problems.append(f"metrics.jsonl: {files.curves.left_out:,} lines that are no JSON objects with a step")
    if files.problems:
        sections.append(Section("Not read", list(dict.fromkeys(files.problems))))
    return [section for section in sections if section is not None]


def head_of(files: RunFiles, marks: Sequence[Mark]) -> Head:
    """State, what the run waits for, and its main numbers."""
    state = files.state
    line, command = waits_for(files, state)
    written = time.strftime("%Y-%m-%d %H:%M %z")
    lines = [line, f"Written {written} from {files.folder.resolve()}."]
    return Head(state, lines, command, _facts(files, state), marks)


def waits_for(files: RunFiles, state: str) -> tuple[str, str]:
    """Where a run stands and what it waits for, and the command that continues it or comes next."""
    reason, saved = str(files.status.get("reason") or ""), files.last_saved
    again = f"This command continues it {f'from step {saved:,}' if saved else 'from its beginning'}"
    repeated = files.step - saved
    if repeated > 0 and state != "done":
        again += f"; {repeated:,} later {'step is' if repeated == 1 else 'steps are'} trained again"
    where = f" in {files.starts[-1]['folder']}" if files.starts and files.starts[-1].get("folder") else ""
    again += f"{where}:" if files.command else "."
    of_total = f" of {files.total_steps:,}" if files.total_steps else ""
    match state:
        case "done":
            what = f"It has ended as planned at step {files.step:,}{f' ({reason})' if reason else ''}. It waits for nothing."
            return what, ""
        case "running":
            left = files.curves.last.get("time_left_s")
            until = f", about {duration(left)} before its end" if isinstance(left, (int, float)) else ""
            what = f"It was running when this page was written, at step {files.step:,}{of_total}{until}."
            return f"{what} If it has ended since without recording why: {again[0].lower()}{again[1:]}", files.command
        case "killed":
            what = f"It was killed: no process runs it, and none has recorded why it ended. Last seen at step {files.step:,}"
            ago = duration(time.time() - files.last_change)
            return f"{what}{of_total}, {ago} ago. It waits to be started again. {again}", files.command
        case "preempted":
            return f"It was asked to stop and has saved: {reason}. It waits to be started again. {again}", files.command
        case "failed":
            return f"It ended with an error: {reason}. It waits for you. {again}", files.command
    what = "Its folder has no status.json that can be read, so it is not known whether it runs"
    return f"{what}. {again}", files.command


def _facts(files: RunFiles, state: str) -> list[tuple[str, str]]:
    last, facts = files.curves.last, []
    total = files.total_steps
    percent = f" ({100 * files.step / total:.1f} %)" if total else ""
    facts.append(("step", f"{files.step:,}{f' of {total:,}' if total else ''}{percent}"))
    if files.images:
        facts.append(("images seen", f"{files.images:,}"))
    for name, title in (("loss", "loss"), ("val_loss", "validation loss")):
        curve = files.curves.curve(name)
        if curve is not None:
            facts.append((title, f"{curve.mean[-1]:.4f} at step {curve.steps[-1]:,.0f}"))
    for name, title, form in (
        ("images_per_s", "images per second", "{:,.1f}"),
        ("mfu", "MFU", "{:.1%}"),
        ("peak_mem_gib", "peak memory per rank", "{:.2f} GiB"),
    ):
        if isinstance(last.get(name), (int, float)):
            facts.append((title, form.format(last[name])))
    if files.curves.hours:
        facts.append(("time in training", duration(files.curves.hours * 3600)))
    if files.flops:
        facts.append(("operations", f"{files.flops:.3g} FLOPs"))
    if files.starts:
        facts.append(("ranks", f"{files.starts[-1].get('world_size', '?')} on {hosts_of(files.starts[-1])}"))
        facts.append(("starts", str(len(files.starts))))
    return facts


def hosts_of(start: dict[str, Any]) -> str:
    """The hosts of a start, with the number of ranks of each where it is recorded."""
    hosts = start.get("hosts")
    if not isinstance(hosts, dict) or not hosts:
        return str(start.get("host", "?"))
    named = [f"{host} ({ranks})" if len(hosts) > 1 else str(host) for host, ranks in list(hosts.items())[:8]]
    return ", ".join(named) + (f" and {len(hosts) - 8:,} more" if len(hosts) > 8 else "")


def marks_of(files: RunFiles) -> list[Mark]:
    """Events and restarts at their steps."""
    marks = [Mark(event["step"], _kind(event), _said(event)) for event in files.events]
    for start in files.starts[1:]:
        step = start.get("step")
        if isinstance(step, int):
            marks.append(Mark(step, "start", f"restart after step {step:,} on {hosts_of(start)}{_before(start)}"))
    if files.status.get("state") == "preempted":
        marks.append(Mark(files.step, "stop", f"preempted: {files.status.get('reason')}"))
    return sorted(marks, key=lambda mark: mark.x)


def _kind(event: dict[str, Any]) -> str:
    if event.get("event") == "loss_spike" and event.get("rewind"):
        return "rewind"
    return _EVENTS.get(str(event.get("event")), "failed")


def _said(event: dict[str, Any]) -> str:
    name, loss = event.get("event"), event.get("loss")
    if name == "loss_spike":
        of = f" of {loss:.4g}" if isinstance(loss, (int, float)) else ""
        return f"loss spike{of}{', rewound to the newest checkpoint' if event.get('rewind') else ''}"
    detail = event.get("what") or event.get("problem") or event.get("reason") or ""
    return f"{_WORDS.get(str(name), str(name))}{f': {detail}' if detail else ''}"[:300]


def _before(start: dict[str, Any]) -> str:
    """How the start before this one had ended."""
    after = start.get("after")
    if not isinstance(after, dict):
        return ""
    state, reason = after.get("state"), str(after.get("reason") or "")
    # A run that is still marked as running was killed before it could say more.
    word = "killed" if state == "running" else str(state)
    return f"; before: {word}{f' ({reason[:160]})' if reason else ''}"


def _curves(files: RunFiles, marks: Sequence[Mark]) -> list[Section]:
    names = files.curves.names
    used: set[str] = set()

    def chart(title: str, *lines: tuple[str, str], **options: Any) -> list[Chart]:
        """A chart of (metric, label); none where no metric has values."""
        used.update(name for name, _ in lines)
        drawn = [
            line_of(curve, curve.steps, label, color)
            for color, (name, label) in enumerate(lines)
            if (curve := files.curves.curve(name)) is not None
        ]
        return [Chart(title, drawn, marks=marks, **options)] if drawn else []

    def beside(name: str, title: str = "") -> list[Chart]:
        return chart(title or name, (name, "training"), (f"val_{name}", "validation"))

    parts = [name for name in names if name.startswith("loss_")]
    parts += [
        name.removeprefix("val_")
        for name in names
        if name.startswith("val_loss_") and name.removeprefix("val_") not in parts
    ]
    learning = [
        *beside("loss"),
        *(one for name in parts for one in beside(name, f"{name} (part of the loss)")),
        *beside("accuracy", "accuracy of the next token"),
        *chart("correct token ratio, validation", ("val_ctr", "clean context"), ("val_ctr_noisy", "noisy context")),
        *chart("gradient norm", ("grad_norm", "gradient norm")),
        *chart("learning rate", ("lr", "learning rate")),
        *chart("largest noise rate", ("noise_max", "noise rate"), from_zero=True),
    ]
    used.add("skipped_updates")
    skipped = files.curves.curve("skipped_updates")
    if skipped is not None and skipped.high.max() > 0:
        learning += chart("skipped updates so far", ("skipped_updates", "skipped updates"), from_zero=True)
    speed = [
        *chart("throughput", ("images_per_s", "images per second"), unit="images/s", from_zero=True),
        *chart("MFU (model FLOPs utilization)", ("mfu", "MFU"), from_zero=True),
        *chart("time of a step", *_TIMES.items(), unit="s", from_zero=True),
        *chart(
            "spread over ranks: data and forward",
            ("own_time_min_s", "fastest rank"),
            ("own_time_max_s", "slowest rank"),
            unit="s",
            from_zero=True,
        ),
        *chart("peak memory per rank", ("peak_mem_gib", "peak memory"), unit="GiB", from_zero=True),
    ]
    used |= {"images_per_s_per_gpu", "time_left_s"}
    others = [one for name in names if name not in used for one in chart(name, (name, name))]
    if not (learning or speed or others):
        return [Section("Training", ["No step has been logged yet."])]
    kinds = [words for kind, words in _KINDS.items() if any(mark.kind == kind for mark in marks)]
    dashed = f" Dashed lines: {', '.join(kinds)}." if kinds else ""
    text = [_of_columns(files) + dashed]
    slowest = files.curves.last.get("slowest_host")
    if slowest is not None and files.starts and files.starts[-1].get("world_size") not in (None, 1):
        text.append(f"Slowest at the last logged step: rank {files.curves.last.get('slowest_rank')} on {slowest}.")
    notes = (
        [] if any(chart.title.startswith("MFU") for chart in speed) else ["MFU: the peak of this device is not known."]
    )
    sections = [Section("Training", text, charts=learning), Section("Speed and memory", charts=speed, notes=notes)]
    if others:
        sections.append(Section("Other metrics", charts=others))
    return sections


def _of_columns(files: RunFiles) -> str:
    lines, most = files.curves.lines, files.curves.most_in_a_column
    if most <= 1:
        return f"{lines:,} logged steps."
    band = "the band reaches from the smallest to the largest value"
    return f"{lines:,} logged steps. A point is the mean of up to {most:,} of them; {band}."


def line_of(curve: Curve, x: Any, label: str, color: int) -> Line:
    """The line of a curve over one of its own axes."""
    return Line(label, x, curve.mean, curve.low, curve.high, color)


def _events(files: RunFiles) -> Section | None:
    if not files.events:
        return None
    counts = Counter(_WORDS.get(str(event.get("event")), str(event.get("event"))) for event in files.events)
    text = "; ".join(f"{count:,} x {name}" for name, count in counts.items())
    shown = files.events[-_MOST_ROWS:]
    rows = [[f"{event['step']:,}", _said(event), _positions(event)] for event in reversed(shown)]
    older = len(files.events) - len(shown)
    notes = [f"{older:,} older events are in events.jsonl."] if older else []
    return Section("Events", [text], Table(["step", "event", "data"], rows, frozenset({1, 2})), notes=notes)


def _positions(event: dict[str, Any]) -> str:
    positions = event.get("positions")
    if not isinstance(positions, dict):
        return ""
    return "; ".join(f"rank {rank}: {place}" for rank, place in list(positions.items())[:2])[:200]


def _sheets(files: RunFiles) -> Section | None:
    chosen = evenly(files.sheets, _MOST_SHEETS)
    pictures = [picture for step, path in chosen if (picture := picture_of(path, f"step {step:,}", files.problems))]
    latest = [
        picture for path in files.samples[:1] if (picture := picture_of(path, path.name, files.problems)) is not None
    ]
    if not pictures and not latest:
        return None
    rows: list[tuple[str, Sequence[Picture | None]]] = []
    if pictures:
        rows.append((f"During training: {len(files.sheets):,} sheets of the same classes and seed", pictures))
    if latest:
        rows.append(("Of the newest sampling job", latest))
    return Section("Samples", rows_of_pictures=rows)


def _analyses(files: RunFiles) -> Section | None:
    """The figures that launchers/analyze.py has written into the run's folder."""
    rows: list[tuple[str, Sequence[Picture | None]]] = []
    for folder in sorted(path for path in (files.folder / "analysis").glob("*") if path.is_dir()):
        found = (picture_of(path, path.name, files.problems) for path in sorted(folder.glob("*.png"))[:_MOST_FIGURES])
        if pictures := [picture for picture in found if picture is not None]:
            rows.append((folder.name, pictures))
    return Section("Analyses", rows_of_pictures=rows) if rows else None


def picture_of(path: Path, caption: str, problems: list[str]) -> Picture | None:
    """An image file as it is shown: as it is where it is small, else scaled down; None, with a line in `problems`, for a file
    that is no image."""
    try:
        if path.stat().st_size > _LARGEST_PICTURE:
            raise BadImage("larger than a sheet of samples")
        data = path.read_bytes()
        image = decode_image(data)
    except (OSError, BadImage) as error:
        problems.append(f"{path.name}: {error}")
        return None
    if len(data) <= _AS_IT_IS_BYTES and data.startswith(b"\x89PNG"):
        return Picture(data, caption)
    if image.width > _PICTURE_WIDTH:
        height = max(1, round(image.height * _PICTURE_WIDTH / image.width))
        image = image.resize((_PICTURE_WIDTH, min(height, 4 * _PICTURE_WIDTH)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return Picture(buffer.getvalue(), caption, "jpeg")


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, with the first and the last one."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _scores(files: RunFiles) -> Section | None:
    if not files.results:
        return None
    rows: list[TableRow] = []
    text = []
    for scored in files.results:
        if scored.result is None:
            text.append(f"{scored.file} is not shown: {scored.problem}")
            continue
        rows += rows_of(scored)
    published = any(row.comparable for row in rows)
    if rows and not published and any("FID" in row.cells for row in rows):
        text.append(
            "Published rows are left out: they are of 50,000 images of 256x256 by the published Inception weights, and none of "
            "these is."
        )
    shown = [*rows, *(map(published_row, ROWS.values()) if published else ())]
    return Section("Scores", text, score_table(shown) if shown else None, notes=_token_notes(files))


def rows_of(scored: Scored) -> list[TableRow]:
    """The rows of a result in the table of scores, named by what was sampled from and how."""
    result = scored.result
    assert result is not None
    height, width = result.samples.size
    words = [] if result.checkpoint is None else [f"step {result.checkpoint.step:,}"]
    if result.sample is not None and isinstance(guidance := result.sample.get("guidance"), dict):
        words.append(f"{guidance.get('schedule')} guidance {guidance.get('scale')}")
    name = ", ".join(words) or scored.file
    return our_rows(f"{name} ({scored.file})", result.images, (height, width))


def score_table(rows: Sequence[TableRow]) -> Table:
    """Rows of scores with their counts, references and caveats."""
    titles = list(dict.fromkeys(title for row in rows for title in row.cells))
    header = ["images of", *titles, "samples", "against"]
    caveats = any(row.caveats for row in rows)
    cells = [
        [
            row.model,
            *(row.cells.get(title, "-") for title in titles),
            row.samples,
            row.against,
            *(["; ".join(row.caveats)] if caveats else []),
        ]
        for row in rows
    ]
    return Table(
        [*header, *(["not comparable because"] if caveats else [])], cells, frozenset({len(header) - 1, len(header)})
    )


def _token_notes(files: RunFiles) -> list[str]:
    """Correct token ratio and perplexity of each result."""
    notes = []
    for scored in files.results:
        if scored.result is None or not scored.result.tokens:
            continue
        parts = [
            f"{name.replace('_', ', ')}: ratio {short(values['ctr'])}, perplexity {short(values['perplexity'])} "
            f"({values['sequences']:,} sequences)"
            for name, values in scored.result.tokens.items()
            if isinstance(values, dict)
            and all(is_number(values.get(key)) for key in ("ctr", "perplexity", "sequences"))
        ]
        if parts:
            notes.append(f"Correct token ratio ({scored.file}): {'; '.join(parts)}.")
    return notes


def _scores_in_training(files: RunFiles, marks: Sequence[Mark]) -> Section | None:
    charts = []
    names = dict.fromkeys(name for line in files.evaluations for name in line)
    for name in [name for name in names if name not in ("step", "images_seen")][:_MOST_SCORES]:
        pairs = [(line["step"], line[name]) for line in files.evaluations if is_number(line.get(name))]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            charts.append(Chart(name, [plain_line(name, steps, values)], marks=marks))
    if not charts:
        return None
    text = "Of few samples: for the trend, and comparable only with scores of as many samples (the number behind n)."
    return Section("Scores during training", [text], charts=charts)


def plain_line(label: str, x: Sequence[float], values: Sequence[float], color: int = 0) -> Line:
    """A line through single values."""
    return Line(label, np.array(x, dtype=float), np.array(values, dtype=float), color=color)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _checkpoints(files: RunFiles) -> Section | None:
    if not files.checkpoints:
        return None
    rows = [
        [_step_of(saved), saved.name, size(saved.bytes), _moment(saved.written)]
        for saved in reversed(files.checkpoints)
    ]
    total = sum(saved.bytes for saved in files.checkpoints)
    text = f"{len(files.checkpoints):,} checkpoints, {size(total)}. Training would continue from step {files.last_saved:,}."
    return Section("Checkpoints", [text], Table(["step", "folder", "size", "written"], rows, frozenset({1})))


def _step_of(saved: Saved) -> str:
    return f"{saved.step:,}{'' if saved.complete and '.damaged' not in saved.name else ' (does not count)'}"


def _starts(files: RunFiles) -> Section | None:
    if not files.starts:
        return None
    shown = files.starts[-_MOST_ROWS:]
    rows = [
        [
            str(start.get("time", "")),
            f"{start['step']:,}" if isinstance(start.get("step"), int) else "",
            str(start.get("world_size", "")),
            hosts_of(start),
            str(start.get("device", "")),
            _before(start).removeprefix("; before: "),
            str(start.get("commit", ""))[:48],
        ]
        for start in reversed(shown)
    ]
    header = ["started", "after step", "ranks", "hosts", "device", "the start before", "commit"]
    last = files.starts[-1]
    commands = dict.fromkeys(str(start.get("command", "")) for start in files.starts)
    versions = last.get("versions")
    listed = "\n".join(f"{name} {number}" for name, number in versions.items()) if isinstance(versions, dict) else ""
    folded = [("Command lines, the newest last", "\n".join([*commands][-_MOST_ROWS:]))]
    if listed:
        folded.append(("Versions at the last start", listed))
    return Section("Starts", table=Table(header, rows, frozenset({3, 4, 5, 6})), folded=folded)


def _config(files: RunFiles) -> Section | None:
    if not files.config_text:
        return None
    return Section("Config", folded=[("config.yaml, with every field", files.config_text)])


def duration(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def size(count: int) -> str:
    """A number of bytes in words."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
