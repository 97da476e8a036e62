"""The table of verbs. Parsers, help and suggestions are made from it; it imports nothing that loads slowly."""

from __future__ import annotations

import argparse
import importlib
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from launcher.config.command_line import conf_dir, list_options
from launcher.errors import ConfigError, Problem, did_you_mean
from launcher.security.redaction import redact

# The folder in which runs are looked up by name.
DEFAULT_ROOT = "runs"
# Flags that launcher.cli.main removes from every command line.
_FLAGS_EVERYWHERE = ("--help", "--debug", "--trust-owner", "--version")
# In the help of all verbs: the widest words before a summary on the same line, and the width of a line.
_USAGE_WIDTH, _HELP_WIDTH = 44, 130


_HELP = """\
Full-parameter fine-tuning of Hugging Face models with DeepSpeed ZeRO-3.

  python -m launcher [COMMAND] ...           Without COMMAND, a FILE or overrides start a run
{verbs}

FILE is a YAML file with a run's settings (docs/run-file.md); overrides win over it.
Overrides are key=value (train.max_steps=100) or group=option (model=qwen3_8b); docs/settings.md lists them all.
Flags: --json with commands that report, --debug for tracebacks, COMMAND --help for more, --version;
--trust-owner OWNER (repeatable) accepts files of other users: a NAME, UID, group:NAME, or anyone; docs/security.md.
With train, plan and data, -m starts or shows one run per combination of listed values; --config-dir DIR adds options of yours.
Exit codes: 0 done, 1 the run failed or doctor found a failure, 2 refused before anything started,
3 a check that was asked for (--min-gain, drift) does not hold, 130 interrupted.
"""


class Argument(NamedTuple):
    """A flag or a positional argument: what argparse's add_argument takes."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Verb:
    """A row of the table.

    `run` is the function in launcher.cli that executes the verb, as module:function. `usage` are its main arguments, the
    first sentence of `about` is its line in the help of all verbs, and `elsewhere` are its names in other programs. With
    `takes_settings`, words that no flag explains become `arguments.overrides`, for Hydra, and positional arguments are only for
    the help.
    """

    name: str
    group: str
    run: str
    usage: str
    about: str
    arguments: tuple[Argument, ...] = ()
    takes_settings: bool = False
    elsewhere: str = ""

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the verb; `command` of the result are all words."""
        arguments = argparse.Namespace(command=(*self.name.split()[:1], *words))
        if not self.takes_settings:
            return self._parser().parse_intermixed_args(words, arguments)
        _, arguments.overrides = self._parser().parse_known_args(words, arguments)
        return arguments

    def execute(self, words: Sequence[str]) -> int:
        """Run the verb with the words after it; returns the exit code."""
        arguments = self.parse(words)
        module, _, function = self.run.partition(":")
        exit_code: int = getattr(importlib.import_module(f"launcher.cli.{module}"), function)(arguments)
        return exit_code

    def help(self) -> str:
        """Return the text of `VERB --help`."""
        return self._parser(for_help=True).format_help()

    def _parser(self, for_help: bool = False) -> argparse.ArgumentParser:
        width = shutil.get_terminal_size().columns - 2
        parser = _Parser(
            prog=f"python -m launcher {self.name}",
            description=textwrap.fill(self.about, width),
            epilog=_group_help(width) if for_help and self.takes_settings else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=not self.takes_settings,
        )
        for names, options in (_TRUST_OWNER, *self.arguments):
            if for_help or names[0].startswith("-") or not self.takes_settings:
                parser.add_argument(*names, **options)
        return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are launcher errors that suggest the closest existing word."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        # A mistyped flag may also be why an argument is missing.
        flags = [word.partition("=")[0] for word in self._words if word.startswith("--") and len(word) > 2]
        unknown = next((flag for flag in flags if not any(option.startswith(flag) for option in known)), "")
        if unknown:
            message = f"unrecognized arguments: {unknown}"
        message = re.sub(r"^argument (\S+): expected one argument$", r"\1 needs a value", message)
        remedy = f"{did_you_mean(unknown, known)} {' '.join(self.format_usage().split())}".strip()
        raise ConfigError(redact(message), where="command line", remedy=remedy)


def _number(about: str, parse: Callable[[str], float], accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a converter of words to numbers."""

    def convert(word: str) -> float:
        with suppress(ValueError):
            if accepts(number := parse(word)):
                return number
        raise argparse.ArgumentTypeError(f"{word} is not {about}")

    return convert


def _parse_duration(word: str) -> float:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", word):
        return float(match[1]) * {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}[match[2]]
    raise argparse.ArgumentTypeError(f"{word} is not a duration: write a number and m, h, d or w, such as 30d")


def _arg(names: str, about: str, **options: Any) -> Argument:
    return Argument(tuple(names.split()), {"help": about, **options})


def _switch(name: str, about: str) -> Argument:
    return _arg(name, about, action="store_true")


def _join_texts(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


_MINUTES = _number("a number of minutes above 0", float, lambda number: 0 < number < math.inf)
_SECONDS = _number("a number of seconds from 0.1 to 1,000,000", float, lambda number: 0.1 <= number < 1e6)
_ABOVE_0 = _number("a whole number above 0", int, lambda number: number > 0)
_COUNT = _number("a number of rows", int, lambda number: number >= 0)
_FAULTS = {
    "preempt": "the scheduler preempts the nodes (SIGUSR2)",
    "kill-rank": "one rank is killed",
    "kill-node": "the agent of the last node is killed together with its ranks",
    "hang": "one rank is stopped (SIGSTOP), and all others wait for it",
}
_CACHE_KINDS = {
    "data": "tokenized rows",
    "models": "converted models, and weights of other runs",
    "hub": "downloads from the Hub, kept here if others can write to its own cache",
    "sources": "downloaded data files",
    "scores": "losses of documents under weights",
    "checks": "results of checks of models and settings",
}
# fmt: off
_OWNER = "accept files of this user too: NAME, UID, group:NAME or anyone (repeatable); see docs/security.md"
_TRUST_OWNER = _arg("--trust-owner", _OWNER, metavar="OWNER", action="append")
_ROOT = _arg("--root", f"folder of the runs (default: {DEFAULT_ROOT})", type=Path, default=DEFAULT_ROOT)
_RUN = _arg("run", "name of the run, or path of its directory", metavar="RUN")
_RUNS = _arg("runs", "name of the run, or path of its directory", metavar="RUN", nargs="+")
_FOLLOW = _arg("--follow", "follow the run to its end (default on this machine)", action="store_true", default=None)
_DETACH = _arg("--detach", "return at once (default on a cluster)", dest="follow", action="store_false")
_JSON = _switch("--json", "print JSON")
_REMOVAL = (_switch("--yes", "do not ask"), _switch("--dry-run", "show what would be removed; remove nothing"), _JSON)
_OVERRIDES = _arg("overrides", "settings and options of groups: train.max_steps=100 model=qwen3_8b", nargs="*")
_SETTINGS = (_arg("FILE", "a YAML file with a run's settings (docs/run-file.md); overrides win over it", nargs="?"), _OVERRIDES)

TABLE = (
    Verb("train", "Train", "train:train", "[FILE] [overrides]",
         "Plan, prepare data, start the run; on this machine follow it to its end. The word train may be left out before a file "
         "or an override. With -m it starts several runs.",
         (*_SETTINGS, _FOLLOW, _DETACH,
          _switch("--yes", "start runs that may cost more than run.confirm_usd without a question"),
          _switch("--json", "print an error as JSON")),
         takes_settings=True, elsewhere="run start launch submit fit sft finetune fine-tune"),
    Verb("plan", "Train", "plan:show_plans", "[FILE] [overrides]",
         "Show the complete plan; start nothing.",
         (*_SETTINGS,
          _switch("--why", "add the memory of each stage of a step, and the combinations of settings that were considered"),
          _switch("--script", "add the batch script of Slurm"),
          _switch("--json", "print the plan's file with the keys estimate, checkpoint_gib, warnings and notes")),
         takes_settings=True, elsewhere="validate dry-run estimate"),
    Verb("data", "Train", "data:report_data", "[FILE] [--show N] [--html FILE] [overrides]",
         "Build the data cache and report on it: sizes, problems, trained tokens. The report has the counts of the mixture and "
         "of each source, the findings of the checks, and a few documents with their trained tokens marked. Exit code 2 if a run "
         "with this data would be refused. data --scored RUN ranks a run's documents by their losses: likely mislabeled, "
         "memorized, nothing to learn.",
         (*_SETTINGS,
          _arg("--show", "show N whole rows instead of a few documents", metavar="N", type=_COUNT, default=0),
          _switch("--json", "print the report as JSON"),
          _arg("--html", "also write the report as one HTML page with plots", type=Path, metavar="FILE")),
         takes_settings=True, elsewhere="prepare preprocess tokenize dataset"),

    Verb("init", "Set up", "init:write_file", "[--data FILE] [--model NAME] [--out FILE] [overrides]",
         "Write a commented file of settings that fits data, model and machine. The machine is this one, or that of +cluster=... "
         "The commands that use the file are printed. Nothing is overwritten or started.",
         (_OVERRIDES,
          _arg("--data", "a file, folder, pattern or Hub dataset with your rows (default: a demo)", metavar="FILE"),
          _arg("--model", "a preset, a folder, a Hub id or run:NAME (default: a demo)", metavar="NAME"),
          _arg("--out", "the file to write (default: named after the data)", type=Path, metavar="FILE")),
         takes_settings=True, elsewhere="new create"),
    Verb("doctor", "Set up", "doctor:check_machines", "[FILE] [overrides]",
         "Check what a run needs, on this machine or on every node of a cluster. Checked are GPUs, driver, compiler, kernels, "
         "all-reduce, storage, limits, caches, accounts. With +cluster=slurm or +cluster=ray, the nodes are those of a short "
         "allocation that the run's settings request. Exit code 1 if a check failed. It starts no run and leaves no file.",
         (*_SETTINGS,
          _arg("--timeout", "limit for everything, including time in a queue (default: 15)", metavar="MINUTES",
               type=_MINUTES, default=15.0),
          _switch("--json", "print the results as JSON")),
         takes_settings=True, elsewhere="check env"),
    Verb("schema", "Set up", "config:print_schema", "",
         "Print the JSON Schema of a run's file, for editors. Save it and begin the file with "
         "`# yaml-language-server: $schema=PATH`: the editor then completes settings and shows their descriptions."),

    Verb("ls", "Watch", "status:list_runs", "[FOLDER|URL]",
         "List the runs under ./runs, newest first, or those in a mirror.",
         (_ROOT, _JSON,
          _arg("folder", "folder, or URL of a mirror, to list (default: --root)", metavar="FOLDER|URL", nargs="?")),
         elsewhere="list runs ps"),
    Verb("status", "Watch", "status:show_run", "RUN [--watch]",
         "Show state, step, loss, throughput, cost and alerts of a run.",
         (_ROOT, _JSON, _RUN,
          _arg("--watch", "refresh every SECONDS until the run ends (default: 5)", metavar="SECONDS", type=_SECONDS,
               nargs="?", const=5.0)),
         elsewhere="show info describe watch monitor"),
    Verb("logs", "Watch", "follow:show_log", "RUN [-f] [--rank N]",
         "Show the output of a rank.",
         (_ROOT, _RUN,
          _arg("-f --follow", "follow until the run ends", action="store_true"),
          _arg("--rank", "which rank (default: 0)", type=int, default=0),
          _arg("--attempt", "which attempt (default: the last)", type=int)),
         elsewhere="log tail"),
    Verb("report", "Watch", "report:write_report", "RUN [RUN ...] [--html FILE]",
         "Write curves, goodput, attempts, checkpoints and cost of runs as one HTML page. The page needs no network.",
         (_RUNS, _ROOT,
          _arg("--html", "file to write (default: report.html in the run directory, or in the working directory for several "
               "runs)", type=Path, metavar="FILE"))),
    Verb("dashboard", "Watch", "report:publish_workspace", "RUN|PROJECT [--dry-run]",
         "Create the W&B workspace of a run or a project, or bring its panels up to date.",
         (_arg("target", "name or directory of a run; or a W&B project, ENTITY/PROJECT", metavar="RUN|PROJECT"), _ROOT,
          _switch("--dry-run", "print the workspace as JSON; no network"))),

    Verb("cancel", "Continue", "follow:cancel_run", "RUN",
         "Save and stop a run; a second cancel kills it.",
         (_ROOT, _RUN,
          _arg("--save", "save a checkpoint before stopping (default); a second cancel kills the run",
               action=argparse.BooleanOptionalAction, default=True)),
         elsewhere="stop kill abort interrupt"),
    Verb("resume", "Continue", "train:resume", "RUN [--force] [--yes] [overrides]",
         "Continue a run from its newest checkpoint; RUN may be an address in a mirror.",
         (_ROOT,
          _arg("run", "name of the run, or path of its directory, or its address in a mirror, URL/NAME", metavar="RUN"),
          _arg("overrides", "settings to change, such as train.max_steps=2000", nargs="*"),
          _FOLLOW, _DETACH,
          _switch("--force", "continue with data and settings that differ from those of the checkpoint; without --force they are "
                  "listed"),
          _switch("--yes", "do not ask before the run gets more steps, whatever run.confirm_usd says"),
          _arg("--step", "go back to the checkpoint of this step; later ones are set aside", type=int)),
         elsewhere="continue restart"),
    Verb("checkpoints", "Continue", "checkpoints:show_checkpoints", "RUN [--verify] [--prune]",
         "List checkpoints; verify their digests; remove those that are not kept. The list says why each is kept, and shows "
         "leftovers of unfinished saves and earlier attempts.",
         (_ROOT, _RUN,
          _switch("--verify", "read every file and compare it with its digest"),
          _switch("--prune", "remove damaged checkpoints, leftovers, and what checkpoint.keep_last, keep_every and keep_best do "
                  "not keep"),
          _JSON)),
    Verb("drill", "Continue", "drill:rehearse_fault", "--fault FAULT [overrides]",
         "Rehearse a fault on a short run: does it save and continue, and what does it lose? It takes the settings of `train`. "
         "The run is stopped as soon as it has recovered; its files are kept.",
         (_OVERRIDES,
          _arg("--fault", f"the fault to inject. {_join_texts(_FAULTS)}", metavar="FAULT", choices=tuple(_FAULTS), required=True),
          _arg("--timeout", "limit for the whole drill, including time in a queue (default: 30)", metavar="MINUTES",
               type=_MINUTES, default=30.0),
          _switch("--json", "print the report as JSON")),
         takes_settings=True),

    Verb("evaluate", "Judge and export", "evaluate:evaluate_run",
         "RUN [--step N] [--min-gain METRIC:BASELINE:GAIN] [overrides]",
         "Does the model answer better than its base model? Scores and verdict on held-out prompts. The base model answers "
         "without and with examples. On a cluster, in an allocation with the run's settings. Overrides are settings of evaluate "
         "and cluster, such as evaluate.metrics=[numeric] evaluate.max_prompts=50. +cluster=slurm and the like choose a cluster "
         "other than the run's; cluster=local chooses this machine. Answers are kept in evaluations/ of the run: an evaluation "
         "that was interrupted continues.",
         (_ROOT, _RUN,
          _arg("overrides", "settings of this evaluation, as key=value", nargs="*"),
          _arg("--step", "step of the checkpoint (default: that of the run's export, else the newest)", type=int),
          _arg("--set", "evaluate only this set (repeatable)", metavar="NAME", action="append", default=[]),
          _switch("--here", "answer on this machine, such as a node of an allocation"),
          _switch("--json", "print verdicts, scores and the prompt forms that were compared"),
          _arg("--tasks", "score tasks of lm-evaluation-harness instead, on this machine: arc_easy,ifeval or FILE.jsonl with "
               "choices", metavar="NAMES"),
          _arg("--task-folder", "folder with tasks of your own, as YAML files", metavar="DIR"),
          _arg("--limit", "maximum questions per task, from its beginning (default: all)", type=_ABOVE_0),
          _arg("--min-gain", "exit with code 3 unless the lower bound of the difference to BASELINE (0-shot, few-shot) is at "
               "least GAIN (repeatable)", metavar="METRIC:BASELINE:GAIN", action="append", default=[])),
         elsewhere="eval test"),
    Verb("export", "Judge and export", "export:export_run", "RUN [--step N] [--dtype bf16] [--out DIR] [--replace]",
         "Write a checkpoint as a Hugging Face folder and compare it with the trained model.",
         (_ROOT, _RUN,
          _arg("--step", "step of the checkpoint (default: the newest)", type=int),
          _arg("--dtype", "type of the weights (default: that of the export in the folder, else of the training)",
               choices=("bf16", "fp16", "fp32")),
          _arg("--out", "folder to write (default: export/ in the run directory)", type=Path, metavar="DIR"),
          _switch("--replace", "replace an export of another type or of a later step in the folder"),
          _switch("--no-check", "skip the parity check, which loads the folder with transformers"),
          _arg("--push", "upload the folder to this repository of the Hub; needs HF_TOKEN", metavar="OWNER/NAME")),
         elsewhere="convert merge push upload"),

    Verb("why", "Explain", "explain:explain_step", "RUN STEP",
         "Show the documents of a step, their losses, and what happened around it. Documents come with file and line, their "
         "losses are under the checkpoint before the step, computed on this machine only for these rows; then loss and gradient "
         "norm around it, and alerts, GPU faults and restarts near it.",
         (_RUN, _arg("step", "the step, as in metrics and alerts", metavar="STEP", type=int), _ROOT,
          _switch("--no-scores", "do not compute losses, which loads the model"), _JSON)),
    Verb("data --scored", "Explain", "explain:rank_documents", "RUN [--step N] [--exclude FILE]",
         "Rank a run's documents: likely mislabeled, memorized, or with nothing to learn. They are scored on this machine with "
         "and without their prompts, once: later calls read the scores.",
         (_arg("--scored", "name of the run, or path of its directory", metavar="RUN", required=True), _ROOT,
          _arg("--step", "step whose weights score the documents, 0 for the initial ones (default: the newest checkpoint)",
               type=int),
          _arg("--split", "train, held_out, or a set of eval.sets (default: train)", default="train"),
          _arg("--show", "documents of each list (default: 20)", metavar="N", type=_COUNT, default=20),
          _switch("--json", "print all documents as JSON"),
          _arg("--html", "also write one HTML page with the texts", type=Path, metavar="FILE"),
          _arg("--exclude", "write a list of documents, which data.exclude=FILE leaves out of the next run", type=Path,
               metavar="FILE"),
          _arg("--finding", "finding whose documents --exclude writes, repeatable (default: mislabeled)", action="append",
               choices=("mislabeled", "memorized", "nothing_to_learn")))),
    Verb("drift", "Explain", "explain:compare_prompts", "RUN PROMPTS",
         "Compare prompts of today with those that a run was trained on; exit code 3 if they have drifted. Compared are words "
         "and lengths, and with --likelihood how likely the prompts are under the tuned model and the base model.",
         (_RUN, _arg("prompts", "file of prompts or chats, such as JSON lines", metavar="PROMPTS"),
          _switch("--likelihood", "also score up to 200 prompts of each side under both models, on this machine"),
          _ROOT, _JSON)),

    Verb("config", "Organize", "config:print_settings", "[RUN | FILE] [overrides]",
         "Print the settings of a run, or of a command line, as a file for `plan FILE` and `train FILE`. The file lists the "
         "values that differ from the defaults, and names no options of groups. Values that may be secrets are hidden.",
         (_arg("RUN", "a run, or a file of settings; without either, the overrides alone are printed", nargs="?"), _OVERRIDES,
          _switch("--json", "print every setting as JSON, defaults included"), _ROOT),
         takes_settings=True),
    Verb("diff", "Organize", "diff:compare_runs", "RUN RUN",
         "Show what differs: settings, model, data, code, versions, machines, results. If a side is a file of settings, only "
         "settings are compared.",
         (_ROOT,
          _arg("left", "name of a run, path of its directory, or a file of settings (.yaml)", metavar="RUN"),
          _arg("right", "the run or the file that it is compared with", metavar="RUN"), _JSON),
         elsewhere="compare"),
    Verb("rm", "Organize", "removal:remove_runs", "RUN [RUN ...] [--yes]",
         "Remove runs with all their files, after a question: checkpoints, export, logs, metrics, plan and code. A live run is "
         "refused, and so is one whose weights other runs start from.",
         (_ROOT, _RUNS, *_REMOVAL, _switch("--even-if-needed", "remove a run even if other runs start from its weights")),
         elsewhere="remove delete del"),
    Verb("clean", "Organize", "removal:clean_cache", "[--older-than 30d] [--only KIND] [--dry-run]",
         "Remove parts of the cache that no unfinished run uses, after a question. All parts are listed with size, last use and "
         "the runs that use them; what was used lately is kept, and so is what a live or unfinished run of these folders uses.",
         (_arg("--only", f"parts of one kind (repeatable). {_join_texts(_CACHE_KINDS)}", choices=tuple(_CACHE_KINDS),
               action="append"),
          _arg("--older-than", "parts that were last used longer ago than this, such as 30d, 12h or 2w (default: 7d)",
               metavar="TIME", type=_parse_duration, default="7d"),
          _switch("--shared", "include your own data caches that a group shares; the runs of its other members are not known"),
          *_REMOVAL,
          _arg("--root", "folder of runs that may use the cache (repeatable; default: runs)", action="append")),
         elsewhere="prune cache"),
)
# fmt: on
VERBS = {verb.name: verb for verb in TABLE if " " not in verb.name}


def rows_of(name: str) -> list[Verb]:
    """Return the rows of a verb: `data` has a second one, `data --scored`."""
    return [verb for verb in TABLE if verb.name.split()[0] == name]


def find_verb(name: str, words: Sequence[str]) -> Verb:
    """Return the row of an existing verb for the words after it."""
    flags = {word.partition("=")[0] for word in words}
    return next(verb for verb in reversed(rows_of(name)) if {*verb.name.split()[1:]} <= flags)


def flags_of(name: str) -> list[str]:
    """Return all long flags of a verb, for suggestions."""
    own = (flag for verb in rows_of(name) for argument in verb.arguments for flag in argument.names if flag.startswith("--"))
    return list(dict.fromkeys([*own, *_FLAGS_EVERYWHERE]))


def unknown_verb(name: str) -> Problem:
    """Return the problem with a verb that does not exist, with the one that was meant."""
    word = name.lower()
    matches = [verb.name for verb in VERBS.values() if word in verb.elsewhere.split()] or ["--version"] * (word == "version")
    guess = f"did you mean {matches[0]}?" if matches else did_you_mean(word, [*VERBS])
    remedy = f"{guess} commands are {', '.join(VERBS)}; settings are written key=value".lstrip()
    return Problem(f"there is no command {redact(name)}", where="command line", value=redact(name), remedy=remedy)


def overall_help() -> str:
    """Return the text of `--help`: every verb in its group."""
    lines = []
    for group in dict.fromkeys(verb.group for verb in TABLE):
        lines.append(f"\n{group}:")
        for verb in (one for one in TABLE if one.group == group):
            usage = f"  {verb.name} {verb.usage}".rstrip()
            indent = " " * (_USAGE_WIDTH + 1)
            first = f"{usage:<{_USAGE_WIDTH}} " if len(usage) < _USAGE_WIDTH else indent
            lines += [] if len(usage) < _USAGE_WIDTH else [usage]
            summary = re.split(r"(?<=[.?]) ", verb.about)[0].rstrip(".")
            lines += textwrap.wrap(summary, _HELP_WIDTH, initial_indent=first, subsequent_indent=indent)
    return _HELP.format(verbs="\n".join(lines))


def _group_help(width: int) -> str:
    """Return the options of each config group, and where settings are listed."""
    lines = ["options of each group (group=option):"]
    for group, names in list_options([conf_dir()]).items():
        lines += textwrap.wrap(f"  {group:<11}{', '.join(names)}", width, subsequent_indent=" " * 13)
    end = "docs/settings.md lists every setting. -m takes lists of values, --config-dir DIR adds options of yours."
    return "\n".join([*lines, "", textwrap.fill(end, width)])
