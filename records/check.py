"""Judge a submission folder of the challenge, ours or anybody's: what would a careful reviewer object to?

    python records/check.py records/track_10min_16mb/2026-04-30_Name
    python records/check.py FOLDER FOLDER ... --json > findings.json

Reads README.md, submission.json, the logs and the scripts; runs nothing of the folder. Each finding states its
severity, the rule, where, what was expected and what was found:

    error     breaks a rule of the challenge, or the folder contradicts itself
    warning   a reviewer should look: unusual, incomplete, or suspicious
    info      what could not be judged, or is accepted practice

What cannot be read is a finding; what is only decorated ("17,500,000", "16.9 MB", "[rank0] step:...") is read.
Exit code: 0 nothing above info, 1 the tool was used wrongly (no such folder), 2 warnings, 3 errors.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import check_files  # noqa: F401  (their rules join the table)
import check_logs  # noqa: F401
import check_ours  # noqa: F401
from common import TRACKS
from folder import RULES, SEVERITIES, Submission
from tool import Parser, need, run_tool

EXIT_CODES = {"info": 0, "warning": 2, "error": 3}
VERDICTS = {"info": "sound", "warning": "needs a look", "error": "does not hold"}


@dataclass(frozen=True)
class Finding:
    severity: str
    rule: str
    where: str  # file, or file:line
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.severity:7}  {self.rule:14}  {self.where}: expected {self.expected}, found {self.found}"


def one_line(value: object, limit: int = 300) -> str:
    return " ".join(str(value).split())[:limit]


def guess_track(folder: Path) -> str:
    """The track from the folder's parent, such as track_10min_16mb; else from submission.json; else non_record_16mb."""
    stated = Submission(folder, "").parse("submission.json").get("track")
    for name in (folder.resolve().parent.name, str(stated).replace("-", "_")):
        if name.removeprefix("track_") in TRACKS:
            return name.removeprefix("track_")
    return "non_record_16mb"


def check_folder(folder: Path, track: str | None = None, beat: float | None = None) -> list[Finding]:
    """All findings on a submission folder, worst first. `beat`: the score (bits per byte) that a record is to beat.

    Raises InputError if there is no such folder."""
    folder = existing(Path(folder)).resolve()  # "." has no name
    submission, found = Submission(folder, track or guess_track(folder), beat), []
    for function in RULES:
        try:
            found += [(function.__name__, *complaint) for complaint in function(submission)]
        except Exception as error:  # a foreign folder must not stop the judgement: the rule itself is then the finding
            cause = f"{type(error).__name__}: {one_line(error, 120)}"
            found.append((function.__name__, "warning", folder.name, "a folder that this rule can read", cause))
    found += [("readable", *problem) for problem in submission.problems]
    findings = [Finding(severity, name, str(where), one_line(a), one_line(b)) for name, severity, where, a, b in found]
    return sorted(dict.fromkeys(findings), key=lambda finding: -SEVERITIES.index(finding.severity))


def existing(folder: Path) -> Path:
    need(folder.is_dir(), folder, "a submission folder", "a file" if folder.exists() else "none")
    return folder


def worst(findings: list[Finding]) -> str:
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="info")


def report(folder: Path, findings: list[Finding], seconds: float, shown: Sequence[str] = SEVERITIES) -> None:
    print(folder, *(finding for finding in findings if finding.severity in shown), sep="\n  ")
    errors, warnings, notes = (sum(finding.severity == name for finding in findings) for name in reversed(SEVERITIES))
    print(f"  {VERDICTS[worst(findings)]}: {errors} errors, {warnings} warnings, {notes} notes ({seconds:.1f} s)")


def need_score(beat: float | None) -> None:
    need(beat is None or 0 < beat < 16, "--beat", "a score in bits per byte", beat)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="submission folders")
    parser.add_argument("--track", choices=TRACKS, help="default: from the parent folder or submission.json")
    parser.add_argument("--beat", type=float, metavar="BPB", help="the score that a record is to beat")
    parser.add_argument("--json", action="store_true", help="findings as JSON, for programs")
    parser.add_argument("--quiet", action="store_true", help="leave out findings of severity info")
    args = parser.parse_args(argv)
    need_score(args.beat)
    shown = [severity for severity in SEVERITIES if severity != "info" or not args.quiet]
    for folder in args.folders:
        existing(folder)
    results, everything = [], []
    for folder in args.folders:
        began, track = time.perf_counter(), args.track or guess_track(folder)
        findings = check_folder(folder, track, args.beat)
        everything += findings
        verdict = {"folder": str(folder), "track": track, "verdict": worst(findings)}
        results.append(verdict | {"findings": [asdict(finding) for finding in findings]})
        if not args.json:
            report(folder, findings, time.perf_counter() - began, shown)
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    return EXIT_CODES[worst(everything)]


if __name__ == "__main__":
    sys.exit(run_tool(main))
