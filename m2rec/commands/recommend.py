"""Recommend items by a trained run: python scripts/recommend.py runs/NAME --history TOKEN ...

The history is item tokens, oldest first: apart, or between quotes with spaces between them. With
--user=ID it is what that user of the run's data set did, all of it. Items of the history are left out.
--interactive takes titles from the keyboard and shows how the ranking changes. --input=FILE ranks after
every history of a CSV or Parquet file with the columns user and history, into the Parquet file --output;
--all-users does so for all users of the run's data set, or of --dataset, each after all that they did,
without the items that the run does not know.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from m2rec.cli import Parser, run_command, write_escaped
from m2rec.errors import UserError
from m2rec.serving.dialogue import Dialogue
from m2rec.serving.recommender import Recommendation, Recommender

MAX_TOKEN_WIDTH = 40  # characters of a token in the table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    return run_command("recommend.py", lambda: print_recommendations(parse_options(arguments)))


def print_recommendations(options: argparse.Namespace) -> None:
    """Load the run and print what was asked of it."""
    recommender = Recommender.load(options.run, options.device)
    write_escaped(run_request(options, recommender), sys.stdout)


def run_request(options: argparse.Namespace, recommender: Recommender) -> str:
    """What to print at the end."""
    how = {"exclude_seen": not options.keep_seen, "skip_unknown": options.skip_unknown}
    if options.interactive:
        Dialogue(recommender, options.k, sys.stdout).run(sys.stdin)
        return ""
    if options.input:
        rows = recommender.recommend_file(
            options.input, options.output, options.k, progress=sys.stderr.isatty(), **how
        )
        return f"{rows:,} users: {options.output}\n"
    if options.all_users:
        from m2rec.commands.user_histories import read_user_histories  # RecBole, which --history needs not

        histories = read_user_histories(options.run, dataset=options.dataset, data_path=options.data_path)
        rows = recommender.recommend_users(
            histories, options.output, options.k, not options.keep_seen, skip_unknown=True
        )
        return f"{rows:,} users: {options.output}\n"
    history = select_history(options, recommender)
    found = recommender.recommend(history, options.k, **how)
    return format_as_json(found) if options.json else format_as_table(history, found, recommender.titles)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="run folder, runs/NAME, or what Recommender.save wrote")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--history", nargs="+", help="item tokens, oldest first")
    whose.add_argument("--user", help="a user of the run's data set")
    whose.add_argument("--interactive", action="store_true", help="titles from the keyboard, one per line")
    whose.add_argument("--input", metavar="FILE", help="CSV or Parquet file with the columns user, history")
    whose.add_argument("--all-users", action="store_true", help="everybody in the run's data set")
    add("--dataset", metavar="NAME", help="for --all-users: another data set with the same items")
    add(
        "--data-path",
        "--data_path",
        help="for --user and --all-users: folder with the data set's folder, if it is elsewhere now",
    )
    add("--output", metavar="FILE", help="for --input and --all-users: Parquet file with user, items, scores")
    add("-k", type=int, default=10, help="how many; default: 10")
    add("--keep-seen", action="store_true", help="items of the history may come again")
    add("--skip-unknown", action="store_true", help="leave out items that the run does not know")
    add("--json", action="store_true", help="a list of objects with item, score and title")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    check_option_combinations(options, parser)
    return options


def check_option_combinations(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that don't go together.

    Raises:
        ValueError: two don't.
    """
    into_a_file = bool(options.input or options.all_users)
    if into_a_file != bool(options.output):
        parser.error("--output goes with --input or --all-users, and they with it")
    if options.json and (into_a_file or options.interactive):
        parser.error("--json goes with --history or --user")
    if options.data_path and not (options.user or options.all_users):
        parser.error("--data-path goes with --user or --all-users")
    if options.dataset and not options.all_users:
        parser.error("--dataset goes with --all-users")
    if options.interactive and (options.keep_seen or options.skip_unknown):
        parser.error("--interactive goes with neither --keep-seen nor --skip-unknown")


def select_history(options: argparse.Namespace, recommender: Recommender) -> list[str]:
    """The history that the command line names.

    Raises:
        ValueError: there is no such user, or the user has met items since that the run does not know.
    """
    if options.user is None:
        return split_token_arguments(options.history, recommender)
    history = read_user_history(options.run, options.user, options.data_path)
    if not options.skip_unknown and (unknown := set(history) - set(recommender.tokens)):
        raise UserError(
            f"--user: {options.user!r} has met {min(unknown)!r} since this run was trained; train again, or "
            f"give the known ones by --history"
        )
    return history


def split_token_arguments(given: Sequence[str], recommender: Recommender) -> list[str]:
    """The tokens in the arguments; one with spaces that is no token itself stands for several."""
    known = set(recommender.tokens)
    return [token for text in given for token in ([text] if text in known else text.split())]


def read_user_history(run: Path, user: str, data_path: str | None) -> list[str]:
    """All that a user of a run's data set did, oldest first.

    Raises:
        ValueError: the data set can't be loaded, or has no such user.
    """
    from m2rec.commands.user_histories import (  # RecBole, which --history needs not
        list_user_histories,
        read_user_histories,
    )
    from m2rec.training.run import load_run_data

    config, dataset, _ = load_run_data(run, data_path=data_path)
    histories = dict(list_user_histories(dataset))
    if user in histories:
        return histories[user]
    if user in dict(read_user_histories(run, data_path=data_path)):
        interval = config["user_inter_num_interval"]
        raise UserError(
            f"--user: {user!r} was left out of the run by its filters (user_inter_num_interval: {interval}, "
            f"item_inter_num_interval: {config['item_inter_num_interval']}); give the items by --history"
        )
    raise UserError(f"--user: the data set has no user {user!r}")


def format_as_json(found: Sequence[Recommendation]) -> str:
    """The recommendations for machines, in ASCII."""
    return json.dumps([item._asdict() for item in found]) + "\n"


def format_as_table(history: Sequence[str], found: Sequence[Recommendation], titles: dict[str, str]) -> str:
    """The end of the history, and the recommendations, a line each."""
    past = [(shorten_token(token), titles.get(token, "")) for token in history[-5:]]
    best = [(shorten_token(item.item), f"{item.score:.3f}", item.title) for item in found]
    width = max(len("item"), *(len(row[0]) for row in [*past, *best]))
    lines = [f"after {len(history):,} items, the last of them:"]
    lines += [f"{'':>5}{token:<{width}}  {title}".rstrip() for token, title in past]
    lines += ["", f"{'':>3}  {'item':<{width}}  {'score':>8}  title"]
    lines += [
        f"{place:>3}  {token:<{width}}  {score:>8}  {title}".rstrip()
        for place, (token, score, title) in enumerate(best, 1)
    ]
    return "\n".join(lines) + "\n"


def shorten_token(token: str) -> str:
    """A token that fits into a table."""
    return token if len(token) <= MAX_TOKEN_WIDTH else token[: MAX_TOKEN_WIDTH - 1] + "…"
