"""From what a user names (built-in tasks, lm-evaluation-harness's own, YAML files) to tasks that can be run."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import constants

from hf_quant.errors import DependencyError, EvaluationError
from hf_quant.evaluation import task_set

logger = logging.getLogger("hf_quant")
BUILT_IN_SOURCE = "hf-quant"
HARNESS = "lm-eval"
_INSTALL = 'pip install "hf-quant[tasks]"'
_OLDEST_DATASETS = 4  # from here on the library runs no code of a dataset
_UNSAFE_FIX = "leave it out, or allow that with --run-unsafe-code (unsafe_code=True), best in a container."
_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        tasks: name -> lm_eval's task.
        groups: name -> lm_eval's group; their tasks are among ``tasks``.
        sources: task name -> where it came from.
    """

    tasks: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Function:
    """``!function name`` in a YAML file: noticed, not imported."""

    name: str


@dataclass(frozen=True)
class _Spec:
    """One thing to load: what lm_eval's manager is given, and what the user called it."""

    shown: str
    given: Any
    source: str


def load_tasks(specs: Sequence[str | Path], unsafe_code: bool = False) -> LoadedTasks:
    """Find tasks and load their data; nothing that was not named is fetched or run.

    Args:
        specs: each a built-in name (``builtin``, ``hfq-cloze``, ``hfq-cloze-docs``, ...), a task, group, tag or pattern
            (``mmlu_*``) of lm-evaluation-harness, a YAML file, or a directory with YAML files, all of whose tasks are
            meant. A YAML file may name Python functions (``!function``), which are run: it has to be trusted like a
            program.
        unsafe_code: allow tasks that run code which the model wrote, or metrics whose code comes from the Hub.

    Raises:
        DependencyError: lm-eval or a package that a task needs is not installed.
        EvaluationError: no such task, a file that is no task, data that cannot be had, or unsafe code.
    """
    require_harness()
    if not specs:
        raise EvaluationError("no task was named.", f"name one, such as {task_set.SET_NAME}.")
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        found, folders, by_name = _resolve_files(specs)
        # lm_eval reads all of its 10,000 files to know its own tasks, which takes seconds
        index = TaskManager(include_path=folders or None, include_defaults=bool(by_name) or not _complete(folders))
        for asked in by_name:
            found += [_Spec(name, name, HARNESS) for name in _known(asked, index)]
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for spec in found:
            _refuse_unsafe(spec, index.task_index, unsafe_code)
            loaded = _load(spec, index)
            for name in loaded["tasks"]:
                if name in tasks:
                    raise EvaluationError(f"the task {name!r} was named twice.", "name it once.")
                sources[name] = spec.source
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
    return LoadedTasks(tasks, groups, sources)


def require_harness() -> None:
    """Raise DependencyError unless lm-eval and a `datasets` that runs no code of data sets are installed."""
    try:
        metadata.version("lm-eval")
        datasets = metadata.version("datasets")
    except metadata.PackageNotFoundError as error:
        raise DependencyError(f"tasks need the package {error.name}, which is not installed.", _INSTALL) from error
    if int(datasets.split(".")[0]) < _OLDEST_DATASETS:
        raise DependencyError(
            f"datasets {datasets} can run code of data sets.", f"install datasets >= {_OLDEST_DATASETS}."
        )
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401 - to learn now what is missing
    except ImportError as error:
        raise DependencyError(f"lm-eval cannot be imported: {error}.", _INSTALL) from error


@contextmanager
def quiet_harness() -> Iterator[None]:
    """lm_eval's log without its notes on every default that it takes."""
    theirs = logging.getLogger("lm_eval")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(before)


def functions_of(config: Any) -> list[str]:
    """Names of the Python functions in a task's configuration, wherever they are."""
    if isinstance(config, _Function):
        return [config.name]
    if isinstance(config, Mapping):
        return [name for value in config.values() for name in functions_of(value)]
    if isinstance(config, (list, tuple)):
        return [name for value in config for name in functions_of(value)]
    return [getattr(config, "__name__", type(config).__name__)] if callable(config) else []


def _resolve_files(specs: Sequence[str | Path]) -> tuple[list[_Spec], list[str], list[str]]:
    """(built-in tasks and those of files, directories for lm_eval's index, names that it has to know)."""
    found: list[_Spec] = []
    folders: list[str] = []
    by_name: list[str] = []
    for given in specs:
        text = str(given)
        if built_in := task_set.names(text):
            found += [_Spec(name, task_set.config(name), BUILT_IN_SOURCE) for name in built_in]
        elif not isinstance(given, Path) and not (os.sep in text or text.endswith((".yaml", ".yml"))):
            by_name.append(text)
        elif (path := Path(given).expanduser()).is_file():
            outline = _outline(path)
            if _kind(outline) is None:
                raise EvaluationError(f"{path} defines no task.", "it needs the key `task` (or `group`).")
            if _kind(outline) == "group":  # its members are in the files beside it
                folders.append(str(path.parent))
            _say_functions(path, outline)
            found.append(_Spec(path.name, str(path), path.name))
        elif path.is_dir():
            found += _directory(path)
            folders.append(str(path))
        else:
            raise EvaluationError(
                f"{path} does not exist.", "give a YAML file, a directory with some, or a task's name."
            )
    return found, folders, by_name


def _directory(folder: Path) -> list[_Spec]:
    """Every group of a directory, and the tasks that are in none of them."""
    groups: list[_Spec] = []
    tasks: list[_Spec] = []
    members: set[str] = set()
    for path in sorted(folder.rglob("*.yaml")):
        outline = _outline(path)
        kind = _kind(outline)
        if kind is None:
            continue  # only there to be included by others
        _say_functions(path, outline)
        if kind == "group":
            groups.append(_Spec(str(outline["group"]), str(outline["group"]), path.name))
            members.update(_members(outline))
        else:
            tasks.append(_Spec(str(outline["task"]), str(outline["task"]), path.name))
    found = [spec for spec in (*groups, *tasks) if spec.given not in members]
    if not found:
        raise EvaluationError(f"{folder} has no task.", "give a directory with YAML files of lm-evaluation-harness.")
    return found


def _complete(folders: Sequence[str]) -> bool:
    """Whether the groups in these directories name no task from elsewhere."""
    outlines = [_outline(path) for folder in folders for path in sorted(Path(folder).rglob("*.yaml"))]
    there = {str(outline[kind]) for outline in outlines if (kind := _kind(outline)) is not None}
    return all(there.issuperset(_members(outline)) for outline in outlines if _kind(outline) == "group")


def _members(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's tasks."""
    return [part if isinstance(part, str) else str(part.get("task")) for part in group.get("task") or ()]


def _known(spec: str, index: Any) -> list[str]:
    """The names in lm_eval's index that a name or pattern means."""
    if spec in index.task_index:
        return [spec]
    if matches := index.match_tasks([spec]) if _PATTERN.intersection(spec) else []:
        return list(matches)
    close = difflib.get_close_matches(spec, [*index.all_tasks, *task_set.names(task_set.SET_NAME)], 3)
    raise EvaluationError(
        f"lm-eval {metadata.version('lm-eval')} has no task {spec!r}{_offer(close)}.",
        f"`lm-eval ls tasks` lists its tasks; {task_set.SET_NAME} needs no data; a YAML file is given by its path.",
    )


def _offer(close: Sequence[str]) -> str:
    return f"; close to it are {', '.join(close)}" if close else ""


def _load(spec: _Spec, index: Any) -> Any:
    """lm_eval's own loading, which fetches data and imports the functions that the task names."""
    task = f"the task {spec.shown!r}"
    try:
        return index.load([spec.given])
    except ImportError as error:
        raise DependencyError(f"{task} needs a package that is missing: {error}.", "install it.") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
        jinja2.TemplateError,
    ) as error:
        if isinstance(error, EvaluationError):
            raise
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        why = (str(error).strip().splitlines() or [""])[0]
        raise EvaluationError(
            f"{task} cannot be loaded: {type(error).__name__}: {why}{offline}.",
            f"check its data set and the connection; without a Hub {task_set.SET_NAME} and YAML files with local data "
            "work.",
        ) from error


def _refuse_unsafe(spec: _Spec, index: Mapping[str, Any], allowed: bool) -> None:
    """Before anything of a task is imported: does it run what the model writes, or code from the Hub?"""
    if allowed or spec.source == BUILT_IN_SOURCE:
        return
    if spec.given in index:
        outlines = [_outline(path) for path in _files(spec.given, index, set())]
    else:
        outlines = [_outline(Path(spec.given))]
    for outline in outlines:
        what = None
        if outline.get("unsafe_code"):
            what = "runs code that the model writes"
        elif any(isinstance(m, Mapping) and m.get("hf_evaluate") for m in outline.get("metric_list") or ()):
            what = "has a metric whose code comes from the Hub"
        if what:
            raise EvaluationError(f"the task {str(outline.get('task') or spec.shown)!r} {what}.", _UNSAFE_FIX)


def _files(name: str, index: Mapping[str, Any], seen: set[str]) -> Iterator[Path]:
    """The YAML files of a task, or of all tasks of a group or tag."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    if entry.yaml_path is not None:
        yield Path(entry.yaml_path)
        members: Any = (entry.cfg or {}).get("task")
    else:
        members = sorted(entry.tags)
    for member in members if isinstance(members, (list, tuple)) else ():
        inner = member if isinstance(member, str) else member.get("task") or member.get("group")
        for part in inner if isinstance(inner, (list, tuple)) else (inner,):
            yield from _files(str(part), index, seen)


def _outline(path: Path, depth: int = 0) -> dict[str, Any]:
    """A task file with what it includes, without importing anything; raises EvaluationError when it is no mapping."""
    try:
        with path.open("rb") as file:
            content = yaml.load(file, Loader=_OutlineLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} is no readable YAML file: {error}.", "correct it or leave it out.") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} is no task: it holds {type(content).__name__}.", "correct it or leave it out.")
    included = content.pop("include", None) or ()
    whole: dict[str, Any] = {}
    for part in [included] if isinstance(included, str) else included:
        if depth > 8:
            raise EvaluationError(f"{path} includes itself.", "correct it or leave it out.")
        whole |= _outline(path.parent / part, depth + 1)
    return whole | content


def _kind(outline: Mapping[str, Any]) -> str | None:
    if "group" in outline:
        return "group"
    return "task" if isinstance(outline.get("task"), str) else None


def _say_functions(path: Path, outline: Mapping[str, Any]) -> None:
    if names := functions_of(outline):
        logger.warning("%s runs Python code of its own: %s", path.name, ", ".join(dict.fromkeys(names)))


class _OutlineLoader(yaml.SafeLoader):
    """YAML as data alone."""


_OutlineLoader.add_constructor("!function", lambda loader, node: _Function(str(node.value)))
