"""How long work shows itself: a bar on a terminal, and a plain line now and then elsewhere (CI logs, nohup).

terminal    stage 2: injection ━━━━━──────────────── 125/500 4.1 users/s loss 2.31, 1:32 left
elsewhere   stage 2: injection 125/500 4.1 users/s loss 2.31, 1:32 left
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

SECONDS_BETWEEN_LINES = 20.0
BAR_WIDTH = 20
RATE_WINDOW_SECONDS = 60.0


def say(console: Console, text: str) -> None:
    """Prints one line as it is: not wrapped, brackets (in paths, in errors) not taken for markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def duration(seconds: float) -> str:
    """`1:32`, or `2:01:32` from an hour on.

    >>> duration(92.4), duration(3600), duration(0.2)
    ('1:32', '1:00:00', '0:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """The state of one piece of work. Made by `progress`; tell it what is done with `update`.

    The rate is that of the last minute, counted from the first update on, so that compilation is not in it.
    """

    def __init__(
        self,
        label: str,
        total: float,
        done: float,
        describe: Callable[[Bar], Sequence[str]],
        clock: Callable[[], float],
    ):
        self.label, self.total, self.done = label, total, done
        self.notes: Sequence[str] = ()
        self.over = False
        self._describe, self._clock, self.started = describe, clock, clock()
        self._samples: collections.deque[tuple[float, float]] = collections.deque()
        self.on_update: Callable[[], None] = lambda: None

    def update(self, done: float, notes: Sequence[str] | None = None) -> None:
        """`done` of `total` is finished; `notes` (kept until replaced) are shown behind, the most important first."""
        now = self._clock()
        self.done = done
        if notes is not None:
            self.notes = notes
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > RATE_WINDOW_SECONDS:
            self._samples.popleft()
        self.on_update()

    @property
    def speed(self) -> float | None:
        """Done a second; None while unknown."""
        samples = tuple(self._samples)  # the bar is drawn by another thread
        if len(samples) < 2:
            return None
        (start, before), (end, after) = samples[0], samples[-1]
        return (after - before) / (end - start) if end > start and after > before else None

    @property
    def ending(self) -> str:
        """`1:32 left`, in the end `done in 6:10`, or nothing while unknown."""
        if self.over:
            how = "done in" if self.done >= self.total else "stopped after"
            return f"{how} {duration(self._clock() - self.started)}"
        return f"{duration((self.total - self.done) / self.speed)} left" if self.speed and self.total else ""

    def plain(self) -> str:
        """Everything in one line."""
        line = " ".join(part for part in (self.label, *self._describe(self), *self.notes) if part)
        return f"{line}, {self.ending}" if self.ending else line

    def fitted(self, width: int) -> Text:
        """The line for a terminal of `width` columns: the label whole, and behind it what fits."""
        count, rate = self._describe(self)
        ending, notes = self.ending and f", {self.ending}", [f" {note}" for note in self.notes]
        share = min(1.0, self.done / self.total) if self.total else 0.0
        bar = Text(" ").append("━" * int(BAR_WIDTH * share), "bar.complete")
        bar.append("─" * (BAR_WIDTH - len(bar) + 1), "bar.back")
        shown: list[Text] = [bar, Text(f" {count}"), Text(rate and f" {rate}"), *map(Text, notes), Text(ending)]
        room = width - len(self.label)
        kept = set()
        for k in (1, len(shown) - 1, *([3] if notes else []), 0, 2, *range(4, len(shown) - 1)):
            if len(shown[k]) <= room:
                kept.add(k)
                room -= len(shown[k])
        return Text.assemble(self.label, *(part for k, part in enumerate(shown) if k in kept), no_wrap=True)


@contextmanager
def progress(
    label: str,
    total: float,
    *,
    done: float = 0,
    unit: str = "steps",
    per_step: float = 1.0,
    describe: Callable[[Bar], Sequence[str]] | None = None,
    console: Console | None = None,
    every: float = SECONDS_BETWEEN_LINES,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """Shows a `Bar` while the block runs: drawn on a terminal; elsewhere a line at the start, now and then, at the end.

    Args:
      every: seconds between plain lines.
      done: what an earlier run has finished; it does not count towards the rate.
      unit, per_step: the rate is shown as `{speed * per_step} {unit}/s`.
      describe: `bar -> (count, rate)` as text, in place of `125/500` and `4.1 users/s`.
    """
    console = console or Console()

    def count_and_rate(bar: Bar) -> tuple[str, str]:
        rate = bar.speed and f"{_three_digits(bar.speed * per_step)} {unit}/s"
        return f"{bar.done:.0f}/{bar.total:.0f}", rate or ""

    bar = Bar(label, total, done, describe or count_and_rate, clock)
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(get_renderable=lambda: bar.fitted(console.width), console=console, refresh_per_second=4):
            try:
                yield bar
            finally:
                bar.over = True
        return
    say(console, bar.plain())
    printed = clock()

    def on_update() -> None:
        nonlocal printed
        if clock() - printed >= every and bar.done < bar.total:
            printed = clock()
            say(console, bar.plain())

    bar.on_update = on_update
    try:
        yield bar
    finally:
        bar.over = True
        say(console, bar.plain())


def _three_digits(x: float) -> str:
    """At least three significant digits, without an exponent: 0.041, 4.12, 41.2, 4,120."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


class Downloads:
    """What downloads report to: `add_task(name, total bytes)` gives a number, `update(number, completed=...)` moves it.

    As `rich.progress.Progress`, which it stands in for, but it also speaks where there is no terminal: there a line
    every `every` seconds, so that a short download says nothing.
    """

    def __init__(
        self, console: Console, *, every: float = SECONDS_BETWEEN_LINES, clock: Callable[[], float] = time.monotonic
    ):
        self._console, self._every, self._clock = console, every, clock
        self._bars: list[Bar] = []
        self._printed = clock()
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, transient=True)
        self._drawn = console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> Downloads:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._live.stop()

    def add_task(self, description: str, total: float | None = None) -> int:
        bar = Bar(description, total or 0, 0, _megabytes, self._clock)
        bar.update(0)
        self._bars.append(bar)
        return len(self._bars) - 1

    def update(self, task: int, *, completed: float) -> None:
        bar = self._bars[task]
        bar.update(completed)
        if not self._drawn and self._clock() - self._printed >= self._every:
            self._printed = self._clock()
            say(self._console, bar.plain())

    def _draw(self) -> Text:
        return Text("\n").join(bar.fitted(self._console.width) for bar in self._bars)


def _megabytes(bar: Bar) -> tuple[str, str]:
    total = f"/{bar.total / 1e6:.1f}" if bar.total else ""
    return f"{bar.done / 1e6:.1f}{total} MB", f"{_three_digits(bar.speed / 1e6)} MB/s" if bar.speed else ""
