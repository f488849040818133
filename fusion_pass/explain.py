"""``fusedhead.explain(fn)(*args)``: compiles and runs once, and reports what happened to every head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Never

from fusedhead.backend import compile_with
from fusedhead.report.report import Report


def misplaced(name: str, positional: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """The error of a call with ``fn``'s own arguments in the place of those of ``torch.compile``, or ""."""
    settings = inspect.signature(torch.compile).parameters.keys() - {"model", "backend"}
    unexpected = [key for key in keywords if key not in settings]
    if not positional and not unexpected:
        return ""
    what = f"an unexpected argument {unexpected[0]!r}" if unexpected else f"{1 + len(positional)} positional arguments"
    return (
        f"fusedhead.{name} takes a function and the settings of torch.compile ({', '.join(sorted(settings))}), and got "
        f"{what}. The function's own arguments go into a second pair of brackets: fusedhead.{name}(fn)(*args)"
    )


def explain(
    fn: Callable[..., Any], *misplaced_arguments: Never, passes: bool = False, **compile_options: Any
) -> Callable[..., Report]:
    """A function that takes the arguments of ``fn`` and returns a `Report`.

    ``fn`` may be a function, a module, or something already given to ``torch.compile`` (then what was compiled
    is compiled again). ``compile_options`` are those of ``torch.compile``: ``dynamic=``, ``mode=``,
    ``options=`` ... With ``passes`` the report's text ends with the passes of the pipeline, how many edits of the graph
    each made and how long it took. The function runs once, forward only; what became of its logits is in the
    report. Nothing of it stays in Dynamo's cache of ``fn``'s other compilations.

    Raises TypeError where the function's own arguments are given here.
    """
    if wrong := misplaced("explain", misplaced_arguments, compile_options):
        raise TypeError(wrong)
    target = getattr(fn, "_orig_mod", None) or getattr(fn, "_torchdynamo_orig_callable", fn)

    def explained(*args: Any, **kwargs: Any) -> Report:
        report = Report(shows_passes=passes)
        settings = dict(compile_options)
        mode, options = settings.pop("mode", None), settings.pop("options", None)

        def backend(gm: Any, example_inputs: Any) -> Any:
            return compile_with(gm, example_inputs, mode=mode, options=options, observe=report.extend)

        torch.compile(target, backend=backend, **settings)(*args, **kwargs)
        report.heads = [head.seen().ended() for head in report.heads]
        return report

    return explained
