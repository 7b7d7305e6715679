from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dyndiag.detectors import replay
from dyndiag.reports import contents, figures, report, verdict
from dyndiag.reports.chapters.absences import absences
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings import findings
from dyndiag.reports.findings.vanishing import vanishing
from dyndiag.reports.verdict import numbers
from dyndiag.store import Run
from dyndiag.values import Event
from tests.reports import made


def read(folder: Path) -> Contents:
    return contents(Run(folder))


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return read(made.write(tmp_path_factory.mktemp("edge") / "run", made.edge()))


def test_edge(edge: Contents) -> None:
    found = findings(edge)
    first = found.told[0]
    assert first.event.kind == "edge_of_stability" and first.urgency == "know"
    assert first.title == "Sharpness reached 2/η = 5 and stayed there"
    assert "still there when the run ended" in first.when
    assert "samples certified; median edge ratio" in first.reason
    assert "none of them harmful" in found.lead or "neither of them harmful" in found.lead


def test_numbers_below_the_verdict(edge: Contents) -> None:
    ratio = edge.estimates["stability/edge_ratio"]
    stay = findings(edge).told[0].event
    crossed = int(ratio.steps[(ratio.steps >= stay.start) & (ratio.values > 1)][0])
    assert numbers(edge, findings(edge)) == (
        f"Sharpness passed 2/η = 5 at step {crossed:,}. The loss fell from 1.0 to 0.13."
    )


def test_jumps_at_the_edge_are_told_there(edge: Contents) -> None:
    spikes = [event for event in edge.events if event.kind == "loss_spike"]
    assert len(spikes) == 2
    found = findings(edge)
    assert all(one.event.kind != "loss_spike" for one in (*found.told, *found.more))
    stay = found.told[0]
    assert stay.notches == tuple(spike.peak for spike in spikes)
    assert "jumped twice (notches on the timeline)" in stay.what
    assert "the loss came back from each of its two jumps" in verdict(edge)


def test_a_jump_that_did_not_come_back_stands_for_itself(edge: Contents) -> None:
    events = tuple(
        replace(event, end=None) if event.kind == "loss_spike" and event.start > 1500 else event
        for event in edge.events
    )
    found = findings(replace(edge, events=events))
    assert found.told[0].event.kind == "loss_spike" and found.told[0].urgency == "act"
    assert len(found.told[1].notches) == 1


def test_sharpening(edge: Contents) -> None:
    one = next(f for f in findings(edge).told if f.event.kind == "progressive_sharpening")
    assert "on the way to the edge" in one.title
    assert "provisional (hollow)" in one.reason and one.sure != "certain"


def test_sharpening_without_a_threshold(tmp_path: Path) -> None:
    rows = [
        (i, {k: v for k, v in values.items() if not k.startswith("stability/")})
        for i, values in made.edge(900)
    ]
    said = verdict(read(made.write(tmp_path / "run", rows)))
    assert "for this optimizer no threshold is known" in said


def test_a_ratio_below_one_has_not_reached_the_edge(edge: Contents) -> None:
    ratio = edge.estimates["stability/edge_ratio"]
    lower = replace(ratio, values=0.85 * ratio.values)
    stays = tuple(event for event in edge.events if event.kind == "edge_of_stability")
    c = replace(edge, events=stays, estimates={**edge.estimates, ratio.name: lower})
    assert findings(c).told[0].title == "Sharpness came within 12 % of 2/η = 5 and stayed there"
    assert "near the edge of stability; the edge ratio came up to 0.88" in verdict(c)


def test_clipping_takes_the_edge_its_meaning(edge: Contents) -> None:
    stay = next(event for event in edge.events if event.kind == "edge_of_stability")
    norm = edge.series["gradients/norm"]
    clipped = replace(norm, name="gradients/norm_clipped", values=norm.values * 0.5)
    c = replace(edge, events=(stay,), series={**edge.series, "gradients/norm_clipped": clipped})
    assert "clipping cut 100 % of the steps, so this is no evidence of instability" in verdict(c)


def test_stability_gap(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.switch(), {"tasks": ["A", "B"]}))
    assert verdict(c) == (
        "Switching to task B cost task A 28 points within 10 steps; 26 of them came back."
    )
    one = findings(c).told[0]
    assert one.urgency == "look" and "98.0 % to 70.0 %" in one.title
    assert "points" in numbers(c, findings(c)) and "96.0 %" in numbers(c, findings(c))


def test_spike_that_came_back(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked()))
    said = verdict(c)
    assert said.startswith(
        "The loss jumped from 2.5 to 4.6 at step 400 and was back four steps later;"
    )
    assert said.endswith("nothing measured had moved before, which points to the data.")
    assert findings(c).told[0].urgency == "look"


@pytest.mark.parametrize(
    ("last", "said"), [(1.19, "the edge ratio was 1.19 just before"), (0.97, "nothing measured")]
)
def test_spike_at_an_open_edge(tmp_path: Path, last: float, said: str) -> None:
    rows = made.spiked()
    for step, values in rows[::21]:
        values |= made.sample("stability/edge_ratio", 1.01 if step < 390 else last)
    c = read(made.write(tmp_path / "run", rows))
    assert said in verdict(c)


def test_spike_that_stayed(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked(back=False)))
    one = findings(c).told[0]
    assert one.urgency == "act"
    assert "had not come back when the run ended" in verdict(c)


def test_spike_after_which_the_loss_stands_a_little_higher(tmp_path: Path) -> None:
    rows = made.spiked()
    for step, values in rows:
        values["train/loss"] += 0.15 * (step >= 404)  # within what ends a spike
    c = read(made.write(tmp_path / "run", rows))
    one = findings(c).told[0]
    assert one.urgency == "act" and one.title.endswith("and stayed above its old level")
    assert "and stayed above its old level" in verdict(c)


def test_spike_with_a_precursor(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked(logits=True)))
    assert "attention logits in blocks.1 had peaked near 7,000 just before" in verdict(c)
    one = findings(c).told[0]
    assert one.chapter == "logits" and "first passed 1,000 at step 371" in one.what


def test_non_finite_names_the_module(tmp_path: Path) -> None:
    rows = [
        (
            i,
            {
                "train/loss": float("nan") if i >= 121 else 1.0,
                "gradients/norm": float("nan") if i >= 120 else 1.0,
                "gradients/norm/blocks.3.mlp": float("nan") if i >= 120 else 1.0,
                "gradients/norm/head": 1.0,
            },
        )
        for i in range(200)
    ]
    c = read(made.write(tmp_path / "run", rows))
    assert verdict(c) == (
        "The loss became NaN at step 121; the first non-finite value was the gradient of "
        "blocks.3.mlp, one step earlier."
    )
    assert [one.event.kind for one in findings(c).told] == [
        "non_finite"
    ]  # divergence is told there


def test_divergence(tmp_path: Path) -> None:
    rows = [(i, {"train/loss": 2 / (1 + i / 100) if i < 400 else 3.0}) for i in range(600)]
    c = read(made.write(tmp_path / "run", rows))
    assert verdict(c).startswith("The loss has been above its starting value since step 40")
    assert findings(c).told[0].urgency == "act"


def test_probe_failure(tmp_path: Path) -> None:
    rows = made.spiked(60)
    rows[30][1]["failures/Sharpness"] = 1.0
    notices = [{"step": 30, "source": "Sharpness", "text": "Sharpness failed: no kernel."}]
    c = read(made.write(tmp_path / "run", rows, {"notices": notices}))
    one = findings(c).told[0]
    assert one.title == "The probe Sharpness failed one time" and "no kernel" in one.what
    assert one.urgency == "know"


def test_an_unknown_kind_gets_a_plain_finding(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked(100)))
    event = Event("ghost_story", 5, 7, 9, details={"value": 2.5, "why": "<b>"})
    found = findings(replace(c, events=(event,)))
    assert found.told[0].title == "Ghost story at step 5"
    assert found.told[0].colour == "other" and found.told[0].what == "Value 2.50, why <b>."


def test_too_little_confidence_is_no_finding(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked(100)))
    found = findings(replace(c, events=(Event("loss_spike", 50, 50, 51, confidence=0.4),)))
    assert found.told == () and found.undecided == ("a single high loss at step 50",)


def test_worst_first_and_the_rest_in_a_table(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked()))
    spike = c.events[0]
    many = tuple(
        replace(spike, start=i, peak=i, end=i + 2, severity=1 + i / 100) for i in range(300, 330)
    )
    found = findings(replace(c, events=many))
    assert len(found.told) == 12 and len(found.more) == 18
    assert found.told[0].event.start == 329
    assert verdict(replace(c, events=many)).startswith("The loss jumped 30 times and came back")


def test_dots_go_with_confidence_and_status(edge: Contents) -> None:
    stay = next(event for event in edge.events if event.kind == "edge_of_stability")
    for confidence, sure in ((0.95, "certain"), (0.85, "likely"), (0.6, "tentative")):
        event = replace(stay, confidence=confidence, end=1900)
        assert findings(replace(edge, events=(event,))).told[0].sure == sure


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0.5, 0.55, 0.6] * 8, "the edge ratio never passed 0.60"),
        (
            [0.95, 1.0, 0.9, 1.05, 0.98],
            "may have been at the edge from its start; the five samples",
        ),
    ],
)
def test_nothing_and_undecided(tmp_path: Path, ratios: list[float], said: str) -> None:
    rows = [
        (21 * i, {"train/loss": 1.0, **made.sample("stability/edge_ratio", ratio)})
        for i, ratio in enumerate(ratios)
    ]
    assert said in verdict(read(made.write(tmp_path / "run", rows)))


def test_seldom_sampled_curvature_is_told(tmp_path: Path) -> None:
    rows = [(i, {"train/loss": 1.0 - i / 2000}) for i in range(1000)]
    for i in (0, 1, 2, 5):
        rows[i][1].update(made.sample("curvature/sharpness", 2.0))
    c = read(made.write(tmp_path / "run", rows))
    assert "sampled four times, for the last time at step 5" in numbers(c, findings(c))


def test_the_range_is_called_by_what_it_is_the_range_of(tmp_path: Path) -> None:
    rows = [(i, {"train/loss": 1 / (i + 1)}) for i in range(50)]
    for i in (0, 20, 45):
        rows[i][1].update(made.sample("curvature/preconditioned_sharpness", 900.0 + i))
    c = read(made.write(tmp_path / "run", rows))
    assert "Preconditioned sharpness lay between 900 and 945" in numbers(c, findings(c))
    for i in (20, 45):
        rows[i] = (i, {"train/loss": 1 / (i + 1)})
    rows[3][1].update(made.sample("curvature/preconditioned_sharpness", 900.0))
    c = read(made.write(tmp_path / "twice", rows))
    assert "sampled twice, for the last time at step 3" in numbers(c, findings(c))


def test_verdicts_are_short(edge: Contents, tmp_path: Path) -> None:
    runs = [edge, read(made.write(tmp_path / "a", made.spiked(logits=True)))]
    runs.append(read(made.write(tmp_path / "b", made.switch())))
    for c in runs:
        assert len(verdict(c).split()) <= 25
        assert not {"healthy", "optimal", "anomaly", "please"} & set(verdict(c).lower().split())


def test_a_jump_far_above_the_usual_ones_stands_for_itself(edge: Contents) -> None:
    spikes = [event for event in edge.events if event.kind == "loss_spike"]
    high = replace(spikes[0], details={**spikes[0].details, "factor": 40.0})
    events = tuple(high if event is spikes[0] else event for event in edge.events)
    found = findings(replace(edge, events=events))
    assert found.told[0].event == high
    assert found.told[0].urgency == "look"


@pytest.mark.parametrize(("highest", "told"), [(1.6, True), (1.1, False)])
def test_an_edge_ratio_that_rose_before_the_jump_is_its_precursor(
    highest: float, told: bool, tmp_path: Path
) -> None:
    rows = made.spiked(at=400)
    for step, values in rows:
        if step % 21 == 0:
            ratio = highest if 370 <= step < 400 else 0.6
            values |= made.sample("stability/edge_ratio", ratio) | {"stability/full_batch": 1.0}
    c = read(made.write(tmp_path / "run", rows))
    one = next(f for f in findings(c).told if f.event.kind == "loss_spike")
    assert ("the edge ratio had passed 1" in one.sentence) is told
    assert ("the edge ratio had risen to 1.6" in one.what) is told
    assert "points to the data" not in one.sentence + one.what  # every step had the same batch


def test_two_jumps_with_one_precursor_share_a_verdict(tmp_path: Path) -> None:
    rows = made.spiked(steps=900, at=400)
    for step, values in rows:
        if 700 <= step < 704:
            values["train/loss"] += 2.0
        if step % 21 == 0:
            before = 370 <= step < 400 or 670 <= step < 700
            values |= made.sample("stability/edge_ratio", 1.6 if before else 0.6)
    said = verdict(read(made.write(tmp_path / "run", rows)))
    assert said.startswith("The loss jumped twice, up to 1.8-fold, and came back; ")
    assert said.endswith("each time the edge ratio had passed 1 before.")


def raised(rows: made.Rows, at: int, factor: float = 100.0) -> made.Rows:
    """The same with a learning rate of 0.001 that is warmed up, and raised at a step."""
    for step, values in rows:
        rate = 1e-3 * min(1.0, (step + 1) / 10)
        values["train/learning_rate"] = rate * (factor if step >= at else 1.0)
    return rows


def test_a_raised_rate_is_told_with_the_loss_that_left(tmp_path: Path) -> None:
    rows = [(i, {"train/loss": 2 / (1 + i / 100) if i < 403 else 2.05}) for i in range(600)]
    c = read(made.write(tmp_path / "run", raised(rows, 400)))
    assert verdict(c) == (
        "The loss has been back near its starting value since step 405; the learning rate had "
        "risen 100-fold at step 400."
    )
    one = findings(c).told[0]
    assert (
        one.title == "The loss went back to its starting value, 2.00, at step 405 and stayed there"
    )
    assert one.people[0] == "Go back to a checkpoint before step 400."


def test_a_raised_rate_is_told_with_the_loss_that_broke(tmp_path: Path) -> None:
    rows = [(i, {"train/loss": 1.0 if i < 403 else float("nan")}) for i in range(500)]
    said = verdict(read(made.write(tmp_path / "run", raised(rows, 400, 10.0))))
    assert said == (
        "The loss became NaN at step 403; the learning rate had risen 10-fold at step 400."
    )


def test_a_warm_up_is_no_raised_rate(tmp_path: Path) -> None:
    rows = [(i, {"train/loss": 1.0 if i < 12 else float("nan")}) for i in range(100)]
    c = read(made.write(tmp_path / "run", raised(rows, 1000)))
    assert verdict(c) == "The loss became NaN at step 12."


def test_a_raised_rate_is_the_cause_of_a_jump(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", raised(made.spiked(), 375, 2.0)))
    assert verdict(c).endswith("; the learning rate had risen 2.0-fold at step 375.")
    one = findings(c).told[0]
    assert one.chapter == "stability" and "the data" not in one.what + " ".join(one.people)


def test_several_jumps_name_the_cause_of_the_highest(tmp_path: Path) -> None:
    rows = made.spiked(steps=900, at=400)
    for step, values in rows:
        values["train/loss"] += 1.0 * (700 <= step < 704)
        values["continual/task"] = float(step >= 400)
    said = verdict(read(made.write(tmp_path / "run", rows)))
    assert said.endswith("the highest, at step 400, was 1.8-fold, as a new task began.")


def test_several_failed_probes_share_a_verdict(tmp_path: Path) -> None:
    rows = made.edge(60)
    rows[30][1].update({"failures/Sharpness": 1.0, "failures/Trace": 1.0})
    text = "Trace failed: no. Training goes on; the values it would have given are missing."
    notices = [{"step": 30, "source": "Trace", "text": text}]
    c = read(made.write(tmp_path / "run", rows, {"notices": notices}))
    assert verdict(c) == "Two probes failed; nothing else happened in 60 steps."
    said = next(one.what for one in findings(c).told if "Trace" in one.title)
    assert said.count("missing") == 1


def test_a_loss_that_hardly_falls_is_not_nothing(tmp_path: Path) -> None:
    rows = [
        (
            i,
            {
                "train/loss": 2.31 - 1e-5 * i,
                "gradients/norm/first": 3e-11,
                "gradients/norm/last": 0.3 + 1e-3 * (i % 2),
            },
        )
        for i in range(200)
    ]
    c = read(made.write(tmp_path / "run", rows))
    assert verdict(c) == "No event in 200 steps, but the loss hardly fell."
    assert numbers(c, findings(c)).endswith(
        "the gradient norm of first was 1.0·10⁻¹⁰ of that of last: gradients vanish on the way."
    )
    falling = [(i, {"train/loss": 2.31 * 0.999**i}) for i in range(200)]
    said = verdict(read(made.write(tmp_path / "falls", falling)))
    assert said == "Nothing to report: no event in 200 steps."


def test_modules_without_a_gradient_are_named(tmp_path: Path) -> None:
    rows = [(i, {"gradients/norm/a": 0.0, "gradients/norm/b": 1.0}) for i in range(30)]
    assert vanishing(read(made.write(tmp_path / "run", rows))) == (
        "No gradient reached a at the end: nothing is learned there."
    )
    rows = [(i, {"gradients/norm/a": 0.0, "gradients/norm/b": 0.0}) for i in range(30)]
    assert vanishing(read(made.write(tmp_path / "still", rows))) == ""


def test_evidence_without_a_sample_is_no_chart(tmp_path: Path) -> None:
    rows = made.spiked()
    rows[0][1].update(made.sample("stability/edge_ratio", 0.5))
    one = findings(read(made.write(tmp_path / "run", rows))).told[0]
    assert [figure.title for figure in one.figures] == ["Loss", "Gradient norm"]


def test_a_threshold_is_drawn_as_long_as_it_holds(tmp_path: Path) -> None:
    rows = raised(made.spiked(), 400)
    for i in (0, 20, 350):
        rows[i][1].update(made.sample("curvature/sharpness", 2.0) | {"stability/threshold": 2e3})
    c = read(made.write(tmp_path / "run", rows))
    figure = figures.sharpness(c)
    assert figure is not None and figure.marks[0].hi == 399
    assert not any("0.1" in note.text for note in figure.notes)  # no sample at that rate
    rows[500][1]["stability/threshold"] = 20.0
    for _, values in rows:
        values["train/learning_rate"] = max(1e-3, values["train/learning_rate"])
    figure = figures.sharpness(read(made.write(tmp_path / "sampled", rows)))
    assert figure is not None and figure.marks[0].hi == 599
    assert [(note.text, note.y) for note in figure.notes] == [("η = 0.001", 2e3), ("η = 0.1", 20.0)]


def test_the_batch_before_the_jump_is_named_where_the_gradient_norm_was_large(
    tmp_path: Path,
) -> None:
    rows = made.spiked()
    rows[394][1]["gradients/norm"] = 55.0
    c = read(made.write(tmp_path / "run", rows))
    assert verdict(c).endswith(
        "; the gradient norm had stood 55 times above its median at step 394."
    )
    assert any("steps 394 to 40" in line for line in findings(c).told[0].people)


def test_the_adaptive_threshold_reads_as_a_sentence(edge: Contents) -> None:
    metadata = {**edge.metadata, "optimizer": {"class": "Adam"}}
    one = findings(replace(edge, metadata=metadata)).told[0]
    assert one.title == "Sharpness reached its threshold 5.00 and stayed there"
    assert one.label == "Edge of stability, threshold 5.00"


def test_the_median_of_samples_is_not_called_one_of_steps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(11 * i, {"predictions/entropy": 1 + rng.random()}) for i in range(100)]
    figure = figures.entropy(read(made.write(tmp_path / "run", rows)))
    assert figure is not None and figure.unit.endswith("thick: median of 11 samples")


def test_samples_of_the_warm_up_are_counted(tmp_path: Path) -> None:
    rows = made.edge(200)
    for step, values in rows:
        if "stability/warmup" in values:
            values["stability/warmup"] = float(step < 50)
    html = report(made.write(tmp_path / "run", rows)).read_text("utf-8")
    assert "The first three samples, up to step 42, lie in the optimizer" in html
    assert "Measured on the batch of 20 that every step was taken on." in html


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({}, "no training batch was seen whole"),
        ({"stability/realised_edge": 0.5}, "the run ended before its first sample was due"),
    ],
)
def test_batch_sharpness_is_absent_for_a_true_reason(
    extra: dict[str, float], why: str, tmp_path: Path
) -> None:
    rows = [(i, {"train/loss": 1 / (i + 1)} | (extra if i == 3 else {})) for i in range(30)]
    c = read(made.write(tmp_path / "run", rows))
    missing = absences(c)
    assert missing["batch_sharpness"].why == why
    assert missing["sharpness"].line == "dyndiag.Monitor(…, budget=0.5)"


def test_a_jump_at_a_restart_is_told_as_such(tmp_path: Path) -> None:
    rows = made.spiked(back=False)
    folder = made.write(tmp_path / "run", rows[:400])
    made.write(folder, rows[400:], events=replay(rows))
    c = read(folder)
    assert c.restarts == (400,)
    assert verdict(c).endswith("; the run was restarted at step 400.")
    one = findings(c).told[0]
    assert "restored" in one.people[0] and "the data" not in one.sentence
    assert "restarted at step 400" in report(folder).read_text("utf-8")


@pytest.mark.parametrize(("rise", "told"), [(20.0, True), (0.0, False)])
def test_a_loss_that_rose_with_the_rate_is_not_nothing(
    rise: float, told: bool, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 700)
    rows = [
        (
            i,
            {
                "train/loss": (2 / (1 + i / 20)) * (1 + noise[i])
                * (1 + rise * np.exp(-(i - 500) / 6) * (i >= 500)),
                "train/learning_rate": 0.05 if 500 <= i < 505 else 1e-3,
            },
        )
        for i in range(700)
    ]  # fmt: skip
    c = read(made.write(tmp_path / "run", rows))
    assert not c.events  # that detector waits until the rate has settled
    said = verdict(c)
    assert ("; the learning rate had risen 50-fold at step 500." in said) is told
    assert said.startswith("No event in 700 steps, but the loss rose 2" if told else "Nothing to")
