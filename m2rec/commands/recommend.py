"""Recommend items by a trained run: python scripts/recommend.py runs/NAME --history TOKEN ...

The history is item tokens, oldest first: apart, or between quotes with spaces between them. With
--user=ID it is the whole history of that user in the run's data set. Items of the history are left out if the
run's key exclude_seen says so; --keep-seen and --exclude-seen are stronger.
--interactive takes titles from the keyboard and shows how the ranking changes. --input=FILE ranks after
every history of a CSV or Parquet file with the columns user and history, into the Parquet file --output;
--all-users does so for all users of the run's data set, or of --dataset, each after the whole history,
without the items that are unknown to the run.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2rec.cli import Parser, add_recommender_options, run_command, write_escaped
from m2rec.errors import UserError
from m2rec.serving.hub_name import SOURCE_HELP, parse_source

if TYPE_CHECKING:
    from m2rec.serving.recommender import Recommender


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    return run_command("recommend", lambda: answer_request(parse_options(arguments)))


def answer_request(options: argparse.Namespace) -> None:
    """Load the run and print or write the recommendations."""
    from m2rec.serving.dialogue import Dialogue
    from m2rec.serving.recommender import Recommender

    recommender = Recommender.load(options.run, options.device, precision=options.precision)
    options.run = recommender.folder  # of a model on the hub, its folder in the cache
    if options.interactive:
        Dialogue(recommender, options.k, sys.stdout, choose_exclude_seen(options)).run(sys.stdin)
    elif options.output:
        n_users = write_rankings(options, recommender)
        write_escaped(f"{n_users:,} users: {options.output}\n", sys.stdout)
    else:
        write_escaped(rank_items(options, recommender), sys.stdout)


def write_rankings(options: argparse.Namespace, recommender: "Recommender") -> int:
    """Rank for many users into a file; returns their number."""
    exclude_seen = choose_exclude_seen(options)
    if options.input:
        return recommender.recommend_file(
            options.input,
            options.output,
            options.k,
            exclude_seen,
            options.skip_unknown,
            progress=sys.stderr.isatty(),
        )
    from m2rec.commands.user_histories import read_user_histories  # loads RecBole

    histories = read_user_histories(options.run, dataset=options.dataset, data_path=options.data_path)
    return recommender.recommend_users(histories, options.output, options.k, exclude_seen, skip_unknown=True)


def rank_items(options: argparse.Namespace, recommender: "Recommender") -> str:
    """The ranking after one history, as text."""
    from m2rec.serving.formatting import RankedEntries, format_as_json, format_as_table

    if options.user is None:
        history = split_tokens(options.history, recommender)
    else:
        history = read_user_history(options.run, options.user, options.data_path)
    ranking = recommender.recommend(
        history, options.k, choose_exclude_seen(options), skip_unknown=options.skip_unknown
    )
    shown: RankedEntries = recommender.explain_ranking(history, ranking) if options.explain else ranking
    return format_as_json(shown) if options.json else format_as_table(history, shown, recommender.titles)


def choose_exclude_seen(options: argparse.Namespace) -> bool | None:
    """What --keep-seen and --exclude-seen say; None leaves it to the run."""
    return not options.keep_seen if options.keep_seen or options.exclude_seen else None


def split_tokens(texts: Sequence[str], recommender: "Recommender") -> list[str]:
    """The item tokens in arguments; one with spaces that is not a token itself holds several."""
    known = set(recommender.tokens)
    tokens = []
    for text in texts:
        tokens += [text] if text in known else text.split()
    return tokens


def read_user_history(run: Path, user: str, data_path: str | None) -> list[str]:
    """The whole history of a user of a run's data set, oldest first.

    Raises:
        ValueError: the data set can't be loaded, or the run has no such user.
    """
    from m2rec.commands.user_histories import list_user_histories  # loads RecBole
    from m2rec.training.run import load_run_data

    config, dataset, _ = load_run_data(run, data_path=data_path)
    histories = dict(list_user_histories(dataset))
    if user not in histories:
        filters = [f"{key}: {config[key]}" for key in ("user_inter_num_interval", "item_inter_num_interval")]
        raise UserError(
            f"--user: the data set has no user {user!r}, or the run's filters leave that user out "
            f"({', '.join(filters)}); give the items by --history"
        )
    return histories[user]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("recommend", __doc__)
    add = parser.add_argument
    add("run", type=parse_source, help=SOURCE_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--history", nargs="+", help="item tokens, oldest first")
    source.add_argument("--user", help="a user of the run's data set")
    source.add_argument("--interactive", action="store_true", help="titles from the keyboard, one per line")
    source.add_argument("--input", metavar="FILE", help="CSV or Parquet file with the columns user, history")
    source.add_argument("--all-users", action="store_true", help="everybody in the run's data set")
    add("--dataset", metavar="NAME", help="for --all-users: another data set with the same items")
    add(
        "--data-path",
        "--data_path",
        help="for --user and --all-users: folder with the data set's folder, if it is elsewhere now",
    )
    add("--output", metavar="FILE", help="for --input and --all-users: Parquet file with user, items, scores")
    add("-k", type=int, default=10, help="how many; default: 10")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--keep-seen", action="store_true", help="also recommend items of the history")
    seen.add_argument("--exclude-seen", action="store_true", help="leave out the items of the history")
    add("--skip-unknown", action="store_true", help="skip items that are unknown to the run")
    add("--explain", action="store_true", help="beside each item, the items of the history that speak for it")
    add("--json", action="store_true", help="a list of objects with item, score and title")
    add_recommender_options(parser)
    options = parser.parse_args(arguments)
    check_option_combinations(options, parser)
    return options


def check_option_combinations(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that can't be combined.

    Raises:
        ValueError: two options can't be combined, or one requires another.
    """
    into_a_file = bool(options.input or options.all_users)
    if into_a_file != bool(options.output):
        parser.error("--output requires --input or --all-users, and they require --output")
    if options.json and (into_a_file or options.interactive):
        parser.error("--json requires --history or --user")
    if options.explain and (into_a_file or options.interactive):
        parser.error("--explain requires --history or --user")
    if options.data_path and not (options.user or options.all_users):
        parser.error("--data-path requires --user or --all-users")
    if options.dataset and not options.all_users:
        parser.error("--dataset requires --all-users")
    if options.interactive and options.skip_unknown:
        parser.error("--interactive can't be combined with --skip-unknown")
