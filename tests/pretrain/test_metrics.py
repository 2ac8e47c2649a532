from __future__ import annotations

from pathlib import Path

from mixwright.pretrain.metrics import MetricWriter, read_metrics


def test_a_line_cut_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write("step", 1, {"lr": 0.1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    with MetricWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write("step", 2, {"lr": 0.2})
    assert [(record["step"], record["lr"]) for record in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2)]


def test_a_step_that_was_done_again_counts_as_done_last(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as metrics:
        for step, lr in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.9)):
            metrics.write("step", step, {"lr": lr})
    assert [(record["step"], record["lr"]) for record in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.9), (3, 0.3)]


def test_numbers_reach_tensorboard_by_kind_and_domain(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricWriter(tmp_path, tensorboard=True) as metrics:
        metrics.write("train", 5, {"overall": 1.5, "loss": {"code": 2.5}, "run_digest": "00"})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss/code", "train/overall"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss/code")] == [(5, 2.5)]
