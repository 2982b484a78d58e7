"""Long work shows itself on a terminal of any width, and in logs."""

import io

import pytest
from rich.console import Console

from allmrec_jax.progress import Downloads, duration, progress

NOTES = ["loss 1.234", "item 0.1234", "match 0.01", "rec 1.386", "text 0.001"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_lines(steps: int, seconds: float, **options) -> list[str]:
    clock, out = Clock(), io.StringIO()
    with progress("stage", steps, console=Console(file=out, width=40), clock=clock, **options) as bar:
        for i in range(int(options.get("done", 0)), steps):
            clock.now += seconds
            bar.update(i + 1, NOTES)
    return out.getvalue().splitlines()


def test_without_a_terminal_lines_come_at_the_start_now_and_then_and_at_the_end():
    lines = plain_lines(500, 0.5, unit="users", per_step=4)
    assert lines[0] == "stage 0/500"
    assert lines[1] == "stage 40/500 8 users/s " + " ".join(NOTES) + ", 3:50 left"  # not wrapped at 40 columns
    assert lines[-1] == "stage 500/500 8 users/s " + " ".join(NOTES) + ", done in 4:10"
    assert len(lines) == 2 + 12  # one every 20 s of 250 s


def test_what_an_earlier_run_did_is_counted_but_not_as_speed():
    lines = plain_lines(500, 1.0, unit="users", done=480)
    assert lines[0] == "stage 480/500"
    assert " 1 users/s " in lines[-1]


def test_an_interruption_is_said():
    clock, out = Clock(), io.StringIO()
    console = Console(file=out)

    def work() -> None:
        with progress("stage", 9, console=console, clock=clock) as bar:
            clock.now = 65
            bar.update(3)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        work()
    assert out.getvalue().splitlines()[-1] == "stage 3/9, stopped after 1:05"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_on_a_terminal_the_label_is_whole_and_nothing_is_cut(width):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with progress("stage 1: alignment", 290, unit="users", per_step=32, console=console, clock=clock) as bar:
        for i in range(5):
            clock.now += 3
            bar.update(i + 1, NOTES)
        line = bar.fitted(width).plain
    assert line.startswith("stage 1: alignment")
    assert len(line) <= width
    for wanted, least in (("5/290", 40), ("14:15 left", 40), ("loss 1.234", 60), ("──", 80), ("users/s", 100)):
        assert wanted in line or width < least
    assert "text 0.001" in line or width < 200
    assert "stage 1: alignment" in out.getvalue()
    assert "…" not in out.getvalue()


def test_downloads_speak_in_logs_only_when_they_last():
    clock, out = Clock(), io.StringIO()
    with Downloads(Console(file=out, width=40), clock=clock) as downloads:
        quick = downloads.add_task("config.json", total=1000)
        downloads.update(quick, completed=1000)
        assert out.getvalue() == ""
        slow = downloads.add_task("model.safetensors", total=90_000_000)
        for second in range(1, 46):
            clock.now = second
            downloads.update(slow, completed=second * 2_000_000)
    assert out.getvalue().splitlines() == [
        "model.safetensors 40.0/90.0 MB 2 MB/s, 0:25 left",
        "model.safetensors 80.0/90.0 MB 2 MB/s, 0:05 left",
    ]


def test_downloads_of_unknown_size_are_drawn():
    out = io.StringIO()
    with Downloads(Console(file=out, width=60, force_terminal=True, legacy_windows=False)) as downloads:
        downloads.update(downloads.add_task("u.data", total=None), completed=2_500_000)
    assert "u.data" in out.getvalue()
    assert "2.5 MB" in out.getvalue()


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 7384)] == ["0:00", "1:00", "59:59", "1:00:00", "2:03:04"]
