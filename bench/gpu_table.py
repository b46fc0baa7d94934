"""The GPU suite's figures as a short table; everything else is in its JSON."""

from typing import Any

Report = dict[str, Any]


def table(document: Report) -> str:
    sections: dict[str, Report] = document["sections"]
    versions = document["versions"]
    lines = [
        "",
        f"{document['device']}, driver {document['driver']}, torch {versions.get('torch')}, "
        f"triton {versions.get('triton')}, commit {str(document['git'])[:12]}, "
        f"seed {document['seed']}" + (", SMOKE: no figure means anything" * document["smoke"]),
    ]
    makers = {"check": _check, "verify": _verify, "losses": _losses, "decode": _decode}
    for name, report in sections.items():
        checks = report.get("checks", [])
        failed = [check["name"] for check in checks if not check["passed"]]
        left_out = len(report.get("left_out", []))
        lines.append(
            f"\n{name}: {report['status']}, {len(checks) - len(failed)} of {len(checks)} checks, "
            f"{report.get('seconds', 0):.0f} s" + (f", {left_out} cases left out" * bool(left_out))
        )
        lines += makers[name](report)
        lines += [f"  FAILED {what}" for what in failed[:20]]
        if report["status"] in ("raised", "died"):
            why: str = report.get("traceback") or report.get("outcome") or ""
            lines += [f"  {report['status'].upper()} {line}" for line in why.splitlines()[-1:]]
    return "\n".join(lines)


def _check(report: Report) -> list[str]:
    tokens = [check for check in report.get("checks", []) if "near_ties" in check]
    rows, ties = (sum(check[name] for check in tokens) for name in ("rows", "near_ties"))
    return [f"  {rows} rows against the reference ({report.get('backend')}): {ties} near-ties"]


def _verify(report: Report) -> list[str]:
    lines = []
    copied = report.get("copy_bytes_per_second")
    if copied:
        lines.append(f"  copy {copied / 1e12:.2f} TB/s; µs cold / warm, other contenders x ours")
    for row in report.get("timings", []):
        ours = row["contenders"]["ours"]
        line = f"  {row['mode']:7} B={row['batch']:<3} G={row['num']} V={row['vocab']:<6} "
        if "cold" in ours:
            line += f"{ours['cold']:7.1f} /{ours['warm']:7.1f}  "
            line += f"{ours['share_of_copy_cold']:4.0%} of copy  "
        for name, entry in row["contenders"].items():
            if name != "ours" and "times_ours_cold" in entry:
                line += f" {name} {entry['times_ours_cold']:.1f}/{entry['times_ours_warm']:.1f}"
            elif "raised" in entry:
                line += f" {name} raised"
        lines.append(line)
    return lines


def _losses(report: Report) -> list[str]:
    lines = []
    for row in report.get("timings", []):
        line = f"  {row['loss']:9} {row['rows']} x {row['width']} x {row['vocab']:<6}"
        for name, entry in row["contenders"].items():
            if "microseconds" in entry:
                line += f"  {name} {entry['microseconds'] / 1e3:.1f} ms"
                if entry["peak_bytes"] is not None:
                    line += f" {entry['peak_bytes'] / 2**30:.2f} GiB"
            elif "raised" in entry:
                line += f"  {name} raised"
        lines.append(line)
    return lines


def _decode(report: Report) -> list[str]:
    lines = [f"  {report['note']}"] if "note" in report else []
    for row in report.get("scores", []):
        alpha = row["acceptance"]
        lines.append(
            f"  B={row['batch']} T={row['temperature']:g}{' graphs' * row['cuda_graphs']:7}  "
            f"plain {row['plain_tokens_per_second']:.0f}, speculative "
            f"{row['tokens_per_second']:.0f} tokens/s; acceptance rate "
            f"{'none tested' if alpha is None else f'{alpha:.2f}'} "
            f"({row['accepted']}/{row['tested']}), block efficiency {row['block_efficiency']:.2f}"
        )
    return lines
