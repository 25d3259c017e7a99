"""Look at refused events, and send them back.

``python -m dataflows.dead_letter list`` shows them; ``… replay`` sends the originals back to the
topics they came from, each once. Brokers and topic come from the flow's settings
(``KAFKA_BOOTSTRAP_SERVERS``, ``DEAD_LETTERS_TOPIC``) or from the options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime

from confluent_kafka import Consumer
from rich.console import Console
from rich.table import Table

from dataflows.kafka.errors import StartupError
from dataflows.kafka.replay import (
    DeadLetter,
    ReplayError,
    parse_start,
    read_dead_letters,
    replay,
)
from dataflows.kafka.topics import partition_counts
from dataflows.settings import Settings, SettingsError, load_for_tools

PREVIEW = 80
"""Characters of a key or value shown; payloads may be long, and private."""
_PIPED_WIDTH = 1_000_000
"""Columns where no terminal bounds them: a table is only as wide as what is in it."""


def preview(content: bytes | None, limit: int | None = PREVIEW) -> str | None:
    """Return the content as text, cut to `limit` characters; None for a tombstone.

    >>> preview(b"abc"), preview(b"a" * 100)[-3:], preview(None)
    ('abc', 'aa…', None)
    """
    if content is None:
        return None
    text = content.decode("utf-8", "backslashreplace")
    return text if limit is None or len(text) <= limit else text[:limit] + "…"


def _time(letter: DeadLetter) -> str:
    if letter.timestamp < 0:
        return "unknown"
    moment = datetime.fromtimestamp(letter.timestamp / 1000, UTC)
    return moment.isoformat(timespec="milliseconds")


def _show(args: argparse.Namespace, settings: Settings, topic: str) -> None:
    counts: Counter[str] = Counter()
    latest: deque[DeadLetter] = deque(maxlen=args.limit)
    for letter in read_dead_letters(topic, settings.consumer()):
        if args.reason is None or letter.reason == args.reason:
            counts[letter.reason] += 1
            latest.append(letter)
    shown = sorted(latest, key=lambda letter: (letter.timestamp, letter.partition, letter.offset))
    limit = None if args.full else PREVIEW
    if args.json:
        for letter in shown:
            line = {
                "partition": letter.partition,
                "offset": letter.offset,
                "time": _time(letter),
                "reason": letter.reason,
                "detail": letter.detail,
                "from": f"{letter.topic}/{letter.source_partition}/{letter.source_offset}",
                "key": preview(letter.key, limit),
                "value": preview(letter.value, limit),
                "value_bytes": letter.full_bytes
                if letter.full_bytes is not None
                else len(letter.value or b""),
                "replayed": letter.replayed,
            }
            print(json.dumps(line, ensure_ascii=False))
        return
    table = Table("at", "time", "reason", "detail", "from", "key", "value")
    for letter in shown:
        table.add_row(
            f"{letter.partition}:{letter.offset}",
            _time(letter),
            letter.reason,
            letter.detail,
            f"{letter.topic}/{letter.source_partition}/{letter.source_offset}",
            preview(letter.key, limit) or "",
            preview(letter.value, limit) if letter.value is not None else "(tombstone)",
        )
    # Piped, the table keeps its columns instead of being cut at 80.
    console = Console(markup=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    console.print(table)
    total = sum(counts.values())
    reasons = ", ".join(f"{reason or 'no reason'} {count}" for reason, count in counts.items())
    console.print(f"{total} dead letters in {topic}, {len(shown)} shown. {reasons}", soft_wrap=True)


def _replay(args: argparse.Namespace, settings: Settings, topic: str) -> int:
    start = None
    if args.start:
        with closing(Consumer({**settings.consumer(), "group.id": args.group})) as consumer:
            known = partition_counts(consumer, settings.consumer(), [topic], role="source")
        partitions = known[topic]
        start = parse_start(args.start, partitions)
    result = replay(
        topic,
        settings.consumer(),
        settings.producer(),
        group_id=args.group,
        reason=args.reason,
        start=start,
        dry_run=args.dry_run,
    )
    console = Console(markup=False)
    for letter, problem in result.impossible[:20]:
        console.print(
            f"not replayed: {letter.partition}:{letter.offset} ({letter.reason}): {problem}",
            soft_wrap=True,
        )
    sent = sum(result.sent.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.sent.items()))
    console.print(
        f"{sent} dead letters {'would be' if args.dry_run else 'were'} sent back"
        f"{f' ({reasons})' if reasons else ''}, {result.done_before} had been before, "
        f"{len(result.impossible)} cannot be",
        soft_wrap=True,
    )
    return 1 if result.impossible else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``. Returns 1 for what cannot be replayed, 2 for errors."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--bootstrap-servers", help="default: KAFKA_BOOTSTRAP_SERVERS")
    common.add_argument("--topic", help="default: DEAD_LETTERS_TOPIC, or dead_letters")
    common.add_argument("--reason", help="only dead letters with this reason")
    parser = argparse.ArgumentParser(
        prog="python -m dataflows.dead_letter", description="Look at and replay refused events."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("list", parents=[common], help="show dead letters, oldest first")
    show.add_argument("--limit", type=int, default=50, help="show the last N (default 50)")
    show.add_argument("--json", action="store_true", help="one JSON object per line")
    show.add_argument("--full", action="store_true", help=f"whole values, not {PREVIEW} characters")
    again = commands.add_parser(
        "replay", parents=[common], help="send originals back to their topics, each once"
    )
    again.add_argument(
        "--from",
        dest="start",
        nargs="+",
        metavar="OFFSET",
        help="OFFSET or PARTITION:OFFSET to start from, sending also what was sent before",
    )
    again.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    again.add_argument(
        "--group", default="dead-letter-replay", help="consumer group that remembers what was sent"
    )
    args = parser.parse_args(arguments)
    try:
        settings = load_for_tools(args.bootstrap_servers)
        topic = args.topic or settings.dead_letters_topic
        if args.command == "replay":
            return _replay(args, settings, topic)
        _show(args, settings, topic)
    except (SettingsError, StartupError, ReplayError) as error:
        print(f"dataflows.dead_letter: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
