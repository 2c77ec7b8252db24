"""The verb of studies with people: study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chameleon.cli.options import Verbs, add_model_options
from chameleon.cli.output import is_first_process, print_progress, print_result
from chameleon.errors import BadInput


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add("study", study, "Let people judge the answers of two models, on a page that is served here.")
    parser.add_argument("folder", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "models", nargs="*", metavar="A B", help="scorecards of the same prompts, or with --prompts the bundles to evaluate"
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with prompt, and if you like id, category, form")
    parser.add_argument("--report", action="store_true", help="print the results instead of serving the page")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8010, help="port to serve on; 0 takes a free one (default: 8010)")
    add_model_options(parser)


def study(arguments: argparse.Namespace) -> None:
    from chameleon.evaluation.study import STUDY_FILE, Study

    folder = Path(arguments.folder)
    if arguments.models:
        opened = Study.create(folder, scorecards_of(arguments), arguments.seed)
    elif (folder / STUDY_FILE).is_file():
        opened = Study(folder)
    else:
        raise BadInput("no study here", where=folder, remedy="give two scorecards, or --prompts and two bundles")
    if arguments.report:
        report = opened.report()
        print_result(arguments, report, report_text(report))
        return
    serve(opened, arguments.host, arguments.port)


def scorecards_of(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return name → scorecard of each model: those given, or new ones of the prompts."""
    from chameleon.evaluation.study import check_new

    paths = [Path(word) for word in arguments.models]
    names = [path.name if path.name not in ("bundle", "") else path.parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name} {index}" for index, name in enumerate(names, start=1)]
    if not arguments.prompts:
        return dict(zip(names, paths, strict=True))
    folder = Path(arguments.folder)
    check_new(folder, names)
    return {
        name: evaluated(arguments, path, folder.with_name(f"{folder.name}-answers") / str(index))
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    }


def evaluated(arguments: argparse.Namespace, bundle: Path, out: Path) -> Path:
    """Answer the prompts with a bundle, and return the folder of the scorecard."""
    from chameleon.cli.evaluate import model_options
    from chameleon.cli.options import load_model
    from chameleon.evaluation.part import LocalModel
    from chameleon.evaluation.run import evaluate_suites
    from chameleon.evaluation.suite import make_suite
    from chameleon.progress import StatusLine

    suite = make_suite("mixed", "mixed", {"prompts": arguments.prompts, "seed": arguments.seed}, "mixed")
    arguments.model, arguments.server = str(bundle), None
    with StatusLine(enabled=is_first_process()) as status_line:
        evaluate_suites(
            [suite],
            LocalModel(load_model(arguments)),
            out,
            source=str(bundle),
            options=model_options(arguments),
            status=status_line.update,
        )
    return out


def serve(opened: Any, host: str, port: int) -> None:
    """Serve the page until the process is interrupted."""
    from chameleon.evaluation.study_server import StudyServer

    server = StudyServer(opened, host, port)
    print_progress(f"the study is at {server.url}; Ctrl-C ends it, and `--report` prints the results")
    try:
        server.serve_forever()
    finally:
        server.server_close()


def report_text(report: dict[str, Any]) -> str:
    """Return a report as lines."""
    from chameleon.evaluation.statistics import Figure

    alpha = (
        "undefined (too few judges, or all judged alike)" if report["agreement"] is None else f"{report['agreement']:.2f}"
    )
    left = "none" if report["left_chosen"] is None else f"{report['left_chosen']:.0%}"
    lines = [f"{report['judgements']} judgements of {report['judges']} judges; Krippendorff's alpha {alpha}; left {left}"]
    for title, results in (("all", report["all"]), *report["by_category"].items()):
        lines.append(title)
        for pair, wins in results["pairs"].items():
            lines.append(f"  {pair}: {wins['first']} better, {wins['same']} the same, {wins['second']} worse")
        for model, strength in results["strengths"].items():
            fulfilled = results["fulfilled"][model].get("fully")
            done = f"; does fully what was asked {Figure.from_json(fulfilled).text()}" if fulfilled else ""
            lines.append(f"  {model}: log strength {Figure.from_json(strength).text()}{done}")
    return "\n".join(lines)
