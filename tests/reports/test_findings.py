from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dyndiag.reports import contents, verdict
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings import findings
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


def test_spike_that_stayed(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked(back=False)))
    one = findings(c).told[0]
    assert one.urgency == "act"
    assert "had not come back when the run ended" in verdict(c)


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
