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
    makers = {
        "engine": _engine,
        "check": _check,
        "train": _train,
        "tune": _tune,
        "verify": _verify,
        "losses": _losses,
        "decode": _decode,
    }
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
    return "\n".join([*lines, "", *closing(sections)])


def closing(sections: dict[str, Report]) -> list[str]:
    """Three figures that say how far the code is from what the device allows."""
    scores = sections.get("engine", {}).get("scores", [])
    first = {row["gamma"]: row for row in scores if row["batch"] == 1 and not row["temperature"]}
    plain, fast = first.get(0), first.get(4)
    ratios = [
        (entry["times_ours_cold"], row["mode"], row["batch"])
        for row in sections.get("verify", {}).get("timings", [])
        for name, entry in row["contenders"].items()
        if "vLLM" in name and "times_ours_cold" in entry
    ]
    share = speedup = worst = "not measured"
    if plain:
        share = f"{plain['share_of_floor']:.0%}"
    if plain and fast:
        measured = fast["tokens_per_second"] / plain["tokens_per_second"]
        speedup = f"{measured:.2f} of {fast['speedup_of_floors']:.2f}"
    if ratios:
        ratio, mode, batch = min(ratios)
        worst = f"{ratio:.2f} ({mode}, B={batch})"
    return [
        f"plain decoding, B=1: {share} of the floor's speed",
        f"speculative speedup, B=1, γ=4, of what the floors predict: {speedup}",
        f"vLLM's time over ours in `verify`, at worst: {worst}",
    ]


def _engine(report: Report) -> list[str]:
    lines = []
    if "read_bytes_per_second" in report:
        lines.append(
            f"  reads {report['read_bytes_per_second'] / 1e12:.2f} TB/s; target "
            f"{report['target_bytes'] / 1e9:.2f} GB, draft {report['draft_bytes'] / 1e9:.2f} GB"
        )
    for row in report.get("scores", []):
        lines.append(
            f"  B={row['batch']:<3} T={row['temperature']:g} γ={row['gamma']}  "
            f"{row['tokens_per_second']:7.0f} tokens/s, {row['share_of_floor']:4.0%} of the floor's"
            f"; block efficiency {row['block_efficiency']:.2f}, {row['captures']} captures"
        )
    for row in report.get("transformers", []):
        way = "assisted" if row["assisted"] else "plain"
        lines.append(f"  Transformers, {way}: {row['tokens_per_second']:.0f} tokens/s")
    if found := report.get("many_rows"):
        (rows,) = found["shape"]["batches"]
        lines.append(f"  {rows} rows of a small model: {found['tokens_per_second']:.0f} tokens/s")
    if found := report.get("attention"):
        lines.append(
            f"  a step that sees many slots takes {found['times_beyond_slots']:.2f} times one that "
            "sees few, beyond the slots' bytes"
        )
    return lines


def _check(report: Report) -> list[str]:
    tokens = [check for check in report.get("checks", []) if "near_ties" in check]
    rows, ties = (sum(check[name] for check in tokens) for name in ("rows", "near_ties"))
    return [f"  {rows} rows against the reference ({report.get('backend')}): {ties} near-ties"]


def _train(report: Report) -> list[str]:
    lines = []
    if "matmul_flops" in report:
        lines.append(f"  bf16 products at {report['matmul_flops'] / 1e12:.0f} TFLOP/s")
    for row in report.get("steps", []):
        line = f"  {row['draft']}, {row['way']}: "
        if "reason" in row:
            lines.append(line + row["reason"].splitlines()[0][:100])
            continue
        line += f"{row['tokens_per_second']:.0f} tokens/s, {row['share_of_matmul']:.0%} of products"
        if row["peak_bytes"] is not None:
            line += f", {row['peak_bytes'] / 2**30:.1f} GiB"
        if row["device_waits_seconds"] is not None:
            line += f", the device waits {row['device_waits_seconds'] * 1e3:.0f} ms a step"
        lines.append(line)
    return lines


def _tune(report: Report) -> list[str]:
    lines = [f"  {report['note']}"] if "note" in report else []
    return lines + [f"  {line}" for line in report.get("table", [])]


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
