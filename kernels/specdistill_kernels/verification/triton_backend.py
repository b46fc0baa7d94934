"""`verify` and `sample` in Triton: launches and workspaces. Agrees with `reference` token for token
under the same noise.

Logits are read as they are, in their own dtype and strides; nothing of their size is written.
`verify`: `stats_kernel` goes over the rows; with top-k, top-p or min-p alone, `tally_kernel` a few
times and `cut_kernel` find each row's cut; in mode "block" alone, `excess_kernel` sums what block
verification needs; `decide_kernel` accepts and `race_kernel` draws. `sample`: without filters
`sample_kernel` alone.
"""

from __future__ import annotations

import itertools

import torch
import triton
from torch import Tensor

from specdistill_kernels.aot import Configuration
from specdistill_kernels.tiles import TILES, Tile
from specdistill_kernels.verification.accept import DECISION, decide_kernel, excess_kernel
from specdistill_kernels.verification.draw import race_kernel, sample_kernel
from specdistill_kernels.verification.filter import cut_kernel, tally_kernel
from specdistill_kernels.verification.launch import (
    Division,
    Launcher,
    Side,
    division_for,
    inverse_of,
    workspace,
)
from specdistill_kernels.verification.reference import Drawn, Lenience, Mode, RowSettings, Verdict
from specdistill_kernels.verification.rows import INTS, WORDS, stats_kernel

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEY_SHIFT = {"fp32": 0, "bf16": 16, "fp16": 13}  # low bits that are 0 in float32 of this dtype
PIVOTS = 8
DECIDE = Tile(0, 16)  # a request, whatever the vocabulary
LARGEST = 2**18


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    rows: RowSettings,
    *,
    lengths: Tensor,
    draft_vocab: Tensor | None,
    draft_lse: Tensor | None,
    point_mass: Tensor | None,
    mode: Mode,
    lenience: Lenience | None,
    division: Division | None = None,
) -> Verdict:
    """As `reference.verify`, with `counter_noise`. Three launches, five more with filters and one
    more in mode "block". `verification` has checked the arguments.
    """
    target = Side.of(target_logits)
    draft = target if draft_logits is None else Side.of(draft_logits)
    batch, num = draft_tokens.shape
    device = target_logits.device
    tokens = torch.empty(batch, num + 1, dtype=torch.int64, device=device)
    accepted = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return Verdict(tokens, accepted)
    division = division or division_for(device, batch, num, target.width)
    kind, epsilon = ("lin", 1.0) if lenience is None else (lenience.kind, lenience.epsilon)
    lengths = lengths.to(torch.int64).contiguous()
    temperature = rows.temperature.to(torch.float32).contiguous()
    inverse = None if draft_vocab is None else inverse_of(draft_vocab, target.width)
    launch = _launcher(target, draft, batch, num, division, temperature, rows.filtered)
    launch.arguments |= {
        "tokens": draft_tokens.to(torch.int64).contiguous(),
        "lengths": lengths,
        "has_tokens": 1,
        "seeds": rows.seeds.to(torch.int64).contiguous(),
        "steps": rows.step.to(torch.int64).contiguous(),
        "certain": _or(point_mass, lengths.view(torch.int8), torch.int8),
        "inverse": _or(inverse, lengths.view(torch.int32), torch.int32),
        "draft_lse": _or(draft_lse, temperature, torch.float32),
        "out_tokens": tokens,
        "out_accepted": accepted,
        "has_q": int(draft_logits is not None),
        "has_certain": int(point_mass is not None),
        "has_lse": int(draft_lse is not None),
        "trimmed": int(draft_vocab is not None),
        "block_mode": int(mode == "block" and num > 0),
        "power": epsilon if kind == "exp" else 1.0,
        "divisor": {"lin": epsilon, "sq": epsilon**2, "exp": 1.0}[kind],
    }
    draft_rows = batch * num if draft_logits is not None else 0
    if draft_lse is not None and not rows.filtered:
        draft_rows = 0
    requests = triton.cdiv(batch, division.rows)
    with torch.cuda.device_of(target_logits):
        _statistics(launch, batch * (num + 1), draft_rows, rows)
        if mode == "block" and num > 1:
            grid = (triton.cdiv(batch * (num - 1), division.rows), launch.arguments["splits"])
            launch(excess_kernel, grid, division.stats)
        launch(decide_kernel, (requests,), DECIDE)
        launch(race_kernel, (requests, launch.races), division.race)
    return Verdict(tokens, accepted)


def sample(
    logits: Tensor, rows: RowSettings, *, position: int, division: Division | None = None
) -> Drawn:
    """As `reference.sample`, with `counter_noise`. One launch, six more with filters. The
    arguments have been checked."""
    drawn = sample_places(logits[:, None], rows, position=position, division=division)
    return Drawn(*(part[:, 0] for part in drawn))


def sample_places(
    logits: Tensor, rows: RowSettings, *, position: int = 0, division: Division | None = None
) -> Drawn:
    """As `reference.sample_places`, with `counter_noise`, at places from `position` on; in as many
    launches as `sample`."""
    batch, places = logits.shape[:2]
    tokens = torch.empty(batch, places, dtype=torch.int64, device=logits.device)
    logsumexp = torch.empty(batch, places, dtype=torch.float32, device=logits.device)
    if tokens.numel() == 0:
        return Drawn(tokens, logsumexp)
    side = Side.of(logits)
    division = division or division_for(logits.device, batch, places - 1, side.width)
    temperature = rows.temperature.to(torch.float32).contiguous()
    seeds = rows.seeds.to(torch.int64).contiguous()
    launch = _launcher(side, side, batch, places - 1, division, temperature, rows.filtered)
    launch.arguments |= {
        "tokens": seeds,  # Without proposals, these three are not looked at.
        "lengths": seeds,
        "certain": seeds.view(torch.int8),
        "has_tokens": 0,
        "has_certain": 0,
        "seeds": seeds,
        "steps": rows.step.to(torch.int64).contiguous(),
        "position": position,
        "out_tokens": tokens,
        "out_lse": logsumexp,
    }
    with torch.cuda.device_of(logits):
        if rows.filtered:
            _statistics(launch, batch * places, 0, rows)
        # The draws count arrivals from 0 in memory of their own: a counter that calls shared would
        # be wrong where two streams draw at once.
        arrived = torch.zeros(batch * places, dtype=torch.int32, device=logits.device)
        grid = (triton.cdiv(batch * places, division.rows), launch.races)
        launch(sample_kernel, grid, division.race, arrived=arrived)
    return Drawn(tokens, logsumexp)


def _or(value: Tensor | None, stand_in: Tensor, dtype: torch.dtype) -> Tensor:
    """An argument in the form the kernels take, or any tensor of its dtype where it is absent."""
    return stand_in if value is None else value.to(dtype).contiguous()


def _launcher(
    target: Side,
    draft: Side,
    batch: int,
    num: int,
    division: Division,
    temperature: Tensor,
    filtered: bool,
) -> Launcher:
    unit = 16 if target.aligned() and draft.aligned() else 1
    width, target_b, target_g = target.in_units(unit)
    draft_width, draft_b, draft_g = draft.in_units(unit)
    parts = division.parts(division.stats, target.width)
    rows = batch * (2 * num + 1)
    candidates = rows * division.room if filtered else 0
    space = workspace(
        target.logits.device,
        {
            "search": rows * WORDS.value if filtered else 0,
            "peaks": rows * parts,
            "masses": (rows + batch * num) * parts,  # the last of them for block verification
            "firsts": batch * (num + 1) * parts,
            "cuts": rows,
            "logsumexps": rows,
            "decisions": batch * DECISION.value,
            "race": batch * (num + 1) * 4 * triton.cdiv(target.width, division.race.block),
            "arrived": batch,
            "candidates": candidates,
        },
    )
    return Launcher(
        division,
        target=target.logits,
        draft=draft.logits,
        temperature=temperature,
        batch=batch,
        num=num,
        width_units=width,
        draft_width_units=draft_width,
        target_b=target_b,
        target_g=target_g,
        draft_b=draft_b,
        draft_g=draft_g,
        splits=triton.cdiv(target.width, division.stats.block),
        filtered=int(filtered),
        UNIT=unit,
        SP=parts,
        RP=division.parts(division.race, target.width),
        **space,
    )


def _statistics(
    launch: Launcher,
    target_rows: int,
    draft_rows: int,
    settings: RowSettings,
) -> None:
    """The launches that leave each row's peak, mass and cut in the workspace."""
    division, arguments = launch.division, launch.arguments

    def blocks(rows: int) -> int:
        return triton.cdiv(target_rows, rows) + triton.cdiv(draft_rows, rows)

    launch(stats_kernel, (blocks(division.rows), arguments["splits"]), division.stats)
    if not arguments["filtered"]:
        return
    more = {
        "top_k": _or(settings.top_k, arguments["lengths"], torch.int64),
        "top_p": _or(settings.top_p, arguments["temperature"], torch.float32),
        "min_p": _or(settings.min_p, arguments["temperature"], torch.float32),
        "has_k": int(settings.top_k is not None),
        "has_p": int(settings.top_p is not None),
        "has_min": int(settings.min_p is not None),
        "room": division.room,
        "SHIFT": KEY_SHIFT[DTYPES[arguments["target"].dtype]],
        "PIVOTS": PIVOTS,
        "ROWS": division.filter_rows,
    }
    rows = blocks(division.filter_rows)
    width = arguments["width_units"] * arguments["UNIT"]
    tallies = max(1, min(triton.cdiv(width, division.tally.block), division.programs // rows))
    for more["turn"] in range(division.rounds):
        launch(tally_kernel, (rows, tallies), division.tally, **more)
    launch(cut_kernel, (rows,), division.cut, **more)


_LOGITS = ("target", "draft")
_POINTERS = dict.fromkeys(
    ("tokens", "lengths", "seeds", "steps", "top_k", "search", "out_tokens", "out_accepted"), "*i64"
) | {"certain": "*i8", "inverse": "*i32", "firsts": "*i32", "arrived": "*i32"}
_POINTERS |= dict.fromkeys(
    ("temperature", "top_p", "min_p", "draft_lse", "peaks", "masses", "cuts", "logsumexps"), "*fp32"
)
_POINTERS |= dict.fromkeys(("decisions", "race", "candidates", "out_lse"), "*fp32")


def configurations() -> list[Configuration]:
    """Every one of them up to 262,144 tokens, for compiling ahead of time: a kernel, a dtype,
    whether all rows start and end on 16 entries, and each choice of `TILES`. No integer is compiled
    for its value.
    """
    found: dict[str, Configuration] = {}
    for tiles, dtype, unit in itertools.product(TILES.values(), DTYPES.values(), (16, 1)):
        division = Division.of(tiles)
        for kernel, tile in (
            (stats_kernel, tiles.stats),
            (tally_kernel, tiles.tally),
            (cut_kernel, tiles.cut),
            (excess_kernel, tiles.stats),
            (decide_kernel, DECIDE),
            (race_kernel, tiles.race),
            (sample_kernel, tiles.race),
        ):
            constants = {
                "UNIT": unit,
                "GP": division.positions,
                "SP": division.parts(division.stats, LARGEST),
                "RP": division.parts(division.race, LARGEST),
                "ROWS": 1,
                "BLOCK": tile.block,
                "SHIFT": KEY_SHIFT[dtype],
                "PIVOTS": PIVOTS,
            }
            types = _POINTERS | dict.fromkeys(_LOGITS, f"*{dtype}")
            types |= dict.fromkeys(INTS, "i32") | {"power": "fp32", "divisor": "fp32"}
            names = kernel.arg_names
            configuration = Configuration(
                kernel,
                {name: types[name] for name in names if name not in constants},
                {name: constants[name] for name in names if name in constants},
                tile.warps,
                (),
            )
            found[str(configuration)] = configuration
    return list(found.values())
