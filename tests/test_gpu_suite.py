"""The GPU suite's mechanics, without a GPU: every section runs, needs nothing it should not, finds
planted faults, and keeps what it has when something breaks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats

from bench import (
    gpu_check,
    gpu_check_losses,
    gpu_check_streams,
    gpu_suite,
    gpu_train,
    gpu_verify,
    rivals,
    vllm_sources,
)
from bench.gpu_session import Session
from bench.gpu_table import closing
from specdistill_kernels import RowSettings, counter_noise, fused_divergence, sample, verify
from specdistill_kernels.verification.noise import DRAFT, exponential

ROOT = Path(__file__).parents[1]
DAY = "86400"  # seconds: a slow machine leaves nothing out
BANNED = ["datasets", "pydantic", "typer", "accelerate", "scipy", "matplotlib", "rich"]
CHECKOUT = f"""
import sys
sys.path[:] = [path for path in sys.path if not path.endswith("kernels")]
sys.modules.update(dict.fromkeys({BANNED}))
"""


def suite(folder: Path, *arguments: str, startup: str = CHECKOUT, **variables: str) -> Any:
    """The command in a process where `startup` runs first, in those that it starts too."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(startup)
    command = [sys.executable, "-m", "bench.gpu_suite", "--out", str(folder / "out"), "--smoke"]
    command += ["--seed", "1"]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | variables
    run = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    document = json.loads((folder / "out" / "suite.json").read_text())
    return run, document


def expect_sound(run: subprocess.CompletedProcess[str], document: Any) -> None:
    statuses = {name: section["status"] for name, section in document["sections"].items()}
    assert statuses == dict.fromkeys(gpu_suite.SHARES, "passed"), run.stdout + run.stderr
    assert run.returncode == 0
    assert document["smoke"] is True
    assert document["versions"]["torch"] == torch.__version__
    assert {"device", "driver", "git", "seed", "cuda"} <= document.keys()
    sections = document["sections"]
    for name, section in sections.items():
        assert section.get("checks") or (name == "tune" and section["backend"] == "auto")
        assert all(check["passed"] for check in section.get("checks", []))
    assert [row["way"] for row in sections["train"]["steps"]] == ["ours", "torch", "TRL"] * 2
    modes = [row["mode"] for row in sections["verify"]["timings"]]
    assert modes == ["T=1", "T=0.7", "top-p", "top-k", "greedy"]
    for row in sections["verify"]["timings"] + sections["losses"]["timings"]:
        assert len(row["contenders"]) >= 2
        assert not any("raised" in entry for entry in row["contenders"].values())
    assert [row["temperature"] for row in sections["decode"]["scores"]] == [0, 1, 0, 1]
    settings = {(r["batch"], r["temperature"], r["gamma"]) for r in sections["engine"]["scores"]}
    assert settings == {(b, t, g) for b in (1, 2) for t in (0, 1) for g in (0, 2, 4, 6)}
    figures = {"profile", "attention", "many_rows", "read_bytes_per_second"}
    assert figures <= sections["engine"].keys()
    assert [row["assisted"] for row in sections["engine"]["transformers"]] == [False, True]
    assert "SMOKE: no figure means anything" in run.stdout
    last = [line.split(":")[0] for line in run.stdout.splitlines()[-3:]]
    assert last == [line.split(":")[0] for line in closing({})]


def test_every_section_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """Nothing installed but torch, triton and transformers; the packages not on the path."""
    run, document = suite(tmp_path, "--seconds", DAY, TRITON_INTERPRET="0")
    expect_sound(run, document)
    assert {section["backend"] for section in document["sections"].values()} == {"auto"}


@pytest.mark.slow
def test_every_section_runs_interpreted(tmp_path: Path) -> None:
    run, document = suite(tmp_path, "--seconds", DAY, TRITON_INTERPRET="1")
    expect_sound(run, document)
    assert {section["backend"] for section in document["sections"].values()} == {"triton"}
    assert "ours, triton" in document["sections"]["losses"]["timings"][0]["contenders"]


def test_an_update_is_measured_beside_plain_torch(session: Session) -> None:
    """Of the trainer itself, from the same weights, texts and states."""
    gpu_train.run(session)
    assert failures(session) == []
    steps = session.report["steps"]
    for shape in gpu_train.SMOKE:
        first = {
            row["way"]: row["losses"][0]
            for row in steps
            if row["draft"] == shape.draft and "losses" in row
        }
        assert first["ours"] == pytest.approx(first["torch"], rel=1e-2)
    assert all(row["tokens_per_second"] > 0 for row in steps if "losses" in row)


def test_products_of_an_update_by_hand() -> None:
    shape = gpu_train.SMOKE[0]  # 2 texts of 10 tokens; layers of 16, 24 and 2 heads of 8, 1 shared
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    scores = 2 * 2 * 2 * 2 * 10 * 10 * 8 // 2  # two products, texts, heads; half is masked
    readout = 18 * 67 * (3 * 2 * 16 + 2 * 12)
    assert shape.flops() == 3 * (2 * layer * 20 + scores) * 2 + readout


def test_checks_begin_with_every_feature_at_the_widest_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(Session, "case", lambda self, what, run, share=1.0: names.append(what))
    monkeypatch.setattr(gpu_check, "check_streams", lambda *a, **k: names.append("streams"))
    whole = Session.begin(tmp_path / "check.json", smoke=False, seed=7, seconds=float(DAY))
    gpu_check.run(whole)
    features = len(gpu_check.FEATURES)
    assert len(names) == len(set(names))
    assert all("bfloat16, V=151936" in name for name in names[:features])
    losses = names[features : names.index("streams")]
    assert all("bfloat16, V=151936" in name for name in losses if "loss" in name)
    assert sum("loss" in name for name in losses) == 3 * (len(gpu_check_losses.LOSSES) + 1)


def test_what_takes_seconds_to_compile_is_timed_after_the_rivals() -> None:
    whole = list(gpu_verify.shapes(smoke=False))
    first = [shape.compiled for shape in whole].index(True)
    assert {shape.batch for shape in whole[:first]} == {1, 8, 32, 128}
    assert {shape.mode for shape in whole[:first]} == gpu_verify.MODES.keys()


def test_sections_come_in_the_order_of_their_worth() -> None:
    order = ["engine", "check", "train", "tune", "verify", "losses", "decode"]
    assert list(gpu_suite.SHARES) == order
    assert sum(gpu_suite.SHARES.values()) == pytest.approx(1)
    ends = [line.split(":")[0] for line in closing({})]
    assert ends == [
        "plain decoding, B=1",
        "speculative speedup, B=1, γ=4, of what the floors predict",
        "vLLM's time over ours in `verify`, at worst",
    ]


def test_a_section_that_breaks_leaves_the_others(tmp_path: Path) -> None:
    """One raises, one takes its process with it; what they wrote before stays."""
    dies = """
import bench.gpu_session, os
add = bench.gpu_session.Session.add
def add_and_die(session, kind, **entry):
    add(session, kind, **entry)
    os._exit(70)
bench.gpu_session.Session.add = add_and_die
"""
    startup = f"""{CHECKOUT}
sys.path.insert(0, {str(ROOT)!r})
sys.modules["bench.gpu_losses"] = None
if "verify" in sys.orig_argv and "--here" in sys.orig_argv:
    sys.path.insert(0, {str(ROOT / "kernels")!r}){dies.replace(chr(10), chr(10) + "    ")}
"""
    run, document = suite(tmp_path, "--sections", "losses", "verify", startup=startup)
    losses, verified = document["sections"]["losses"], document["sections"]["verify"]
    assert losses["status"] == "raised"
    assert "bench.gpu_losses" in losses["traceback"]
    assert verified["status"] == "died"
    assert verified["outcome"] == "exit code 70"
    assert len(verified["timings"]) == 1
    assert run.returncode == 1
    assert "losses: raised" in run.stdout


def test_out_of_time_is_told(tmp_path: Path) -> None:
    assert gpu_suite.main(command(tmp_path, "verify", "--seconds", "0")) == 0
    report = json.loads((tmp_path / "verify.json").read_text())
    assert len(report["left_out"]) == 5
    assert "timings" not in report


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("failed", 1), ("died", 1)])
def test_one_bad_section_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    def run_apart(name: str, *more: Any) -> dict[str, str]:
        return {"status": status if name == "losses" else "passed"}

    monkeypatch.setattr(gpu_suite, "run_apart", run_apart)
    assert gpu_suite.main(["--out", str(tmp_path), "--smoke"]) == code


def test_needs_a_device_or_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_suite, "run_apart", None)
    with pytest.raises(SystemExit) as error:
        gpu_suite.main(["--out", str(tmp_path)])
    assert error.value.code == 2


def command(folder: Path, section: str, *more: str) -> list[str]:
    return ["--out", str(folder), "--smoke", "--here", "--seed", "1", "--sections", section, *more]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.begin(tmp_path / "section.json", smoke=True, seed=7, seconds=float(DAY))


def failures(session: Session) -> list[str]:
    report = json.loads(session.file.read_text())
    return [check["name"] for check in report["checks"] if not check["passed"]]


def test_a_case_that_raises_leaves_the_others(session: Session) -> None:
    def run() -> None:
        raise RuntimeError("no such kernel")

    session.case("first", run)
    session.case("second", lambda: session.check("second", True))
    assert failures(session) == ["first"]
    assert "no such kernel" in session.report["checks"][0]["traceback"]
    assert session.report["checks"][1]["name"] == "second"
    assert not session.sound


def broken_verify(change: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, backend: str, **kwargs: Any) -> Any:
        if backend == "reference":
            return verify(*args, **kwargs)
        return change(*args, **kwargs)

    broken.__name__ = "verify"
    return broken


def other_coin(*args: Any, **kwargs: Any) -> Any:
    return verify(
        *args, **{**kwargs, "rows": kwargs["rows"]._replace(step=kwargs["rows"].step + 1)}
    )


def too_many(*args: Any, **kwargs: Any) -> Any:
    found = verify(*args, **kwargs)
    return found._replace(num_accepted=found.num_accepted + 1)


@pytest.mark.parametrize("change", [other_coin, too_many])
def test_a_wrong_token_is_found(
    session: Session, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    monkeypatch.setattr(gpu_check, "verify", broken_verify(change))
    case = gpu_check.Case("planted", batch=8, num=3, vocab=50)
    gpu_check.check_tokens(session, case)
    assert failures(session) == ["planted, float32, V=50"]


def test_a_wrong_draw_is_found(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, backend: str, **kwargs: Any) -> Any:
        position = kwargs.pop("position")
        return sample(*args, **kwargs, position=position + (backend != "reference"))

    broken.__name__ = "sample"
    monkeypatch.setattr(gpu_check, "sample", broken)
    gpu_check.check_tokens(session, gpu_check.Case("planted", batch=8, num=3, vocab=50))
    assert failures(session)


def drawn_from(session: Session, logits: torch.Tensor, token: int, **options: Any) -> bool:
    """Whether rounding may draw this token in place of the other one, which is what is drawn."""
    rows = RowSettings(torch.ones(1), torch.tensor([3]), torch.tensor([0]))._replace(**options)
    row = {"logits": logits[None], "rows": rows, "position": 0}
    assert sample(**row).tokens.tolist() == [1 - token]
    return gpu_check.is_near_tie(session, sample, row, torch.tensor([token]))


def test_only_rounding_explains_a_difference(session: Session) -> None:
    """Two tokens whose race is lost by a hair, by more, and two that are exactly alike."""
    zero = torch.tensor([0])
    noise = exponential(counter_noise(zero + 3, zero, zero, DRAFT, torch.arange(2)))[0].double()
    even = noise.log()
    ahead = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert drawn_from(session, even + 1e-6 * ahead, 0)
    assert drawn_from(session, even - 1e-6 * ahead, 1)
    assert not drawn_from(session, even + 1e-2 * ahead, 0)
    greedy = torch.zeros(1)
    assert not drawn_from(session, torch.tensor([1.0, 1.0]), 1, temperature=greedy)
    loser = int(noise.argmax())
    assert not drawn_from(session, torch.ones(2), loser, top_k=torch.tensor([1]))


def test_a_biased_rule_is_found(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft's noise for the coin and the final draw too."""

    def shared(seeds: Any, step: Any, position: Any, domain: int, tokens: Any) -> Any:
        return counter_noise(seeds, step, position, DRAFT, tokens)

    monkeypatch.setattr(gpu_check_streams, "verify", lambda *a, **k: verify(*a, **k, noise=shared))
    gpu_check_streams.check_streams(session)
    assert "stream, opposite draft, T=1, token" in failures(session)


def test_a_wrong_gradient_is_found(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fused_divergence
    monkeypatch.setattr(
        gpu_check_losses, "fused_divergence", lambda *a, **k: fused(*a, **k) * 1.001
    )
    errors = gpu_check_losses.compare(session, "torch", torch.float32, 67, "jsd", "states")
    assert min(errors.values()) > gpu_check_losses.TOLERANCE[torch.float32]


def test_chi_square_is_scipys() -> None:
    torch.manual_seed(0)
    p = torch.rand(12, dtype=torch.float64) + 0.2
    p /= p.sum()
    counts = torch.multinomial(p, 500, replacement=True).bincount(minlength=12)
    expected = stats.chisquare(counts, p * 500).pvalue
    assert gpu_check_streams.chi_square(counts, p) == pytest.approx(expected, rel=1e-9)

    rare = torch.tensor([0.5, 0.49, 0.004, 0.006], dtype=torch.float64)
    counts = torch.tensor([260, 232, 3, 5])
    expected = stats.chisquare([260, 232, 8], [250, 245, 5]).pvalue
    assert gpu_check_streams.chi_square(counts, rare) == pytest.approx(expected, rel=1e-9)

    impossible = torch.tensor([0.5, 0.5, 0.0])
    assert gpu_check_streams.chi_square(torch.tensor([5, 5, 1]), impossible) == 0


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in functions.items():
        setattr(module, key, value)


@pytest.fixture
def batch() -> rivals.Batch:
    torch.manual_seed(0)
    target, draft = torch.randn(4, 3, 20), torch.randn(4, 2, 20)
    return rivals.Batch(draft.argmax(-1), draft, target, temperature=0.0)


def test_rivals_say_why_they_are_missing(
    batch: rivals.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "flashinfer", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    found = {rival.name: rival for rival in rivals.verifiers(batch)}
    assert all(rival.call is None for rival in found.values())
    assert "cannot import vllm" in found["vLLM MRv2"].reason
    assert "no greedy path" in found["SGLang"].reason


def test_a_rival_that_changed_is_left_alone(
    batch: rivals.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
    fake_module(monkeypatch, module, rejection_sample=lambda target_logits, draft_logits: None)
    rival = rivals.verifiers(batch)[0]
    assert rival.call is None
    assert "lacks ['draft_sampled'," in rival.reason

    fake_module(monkeypatch, "rival", verify=lambda p, q, *, seed=0: None)
    assert rivals._function("rival", "verify", "p", "q")(1, 2) is None
    with pytest.raises(rivals.Unavailable, match="also needs \\['q'\\]"):
        rivals._function("rival", "verify", "p")
    with pytest.raises(rivals.Unavailable, match="has no draw"):
        rivals._function("rival", "draw", "p")


FAKES = {
    "vllm/__init__.py": "raise RuntimeError('all of vLLM would be loaded')",
    "vllm/v1/__init__.py": "raise RuntimeError('all of vLLM would be loaded')",
    "vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py": """
import torch
from vllm.triton_utils import tl, tldevice, triton
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature

def rejection_sample(target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping,
                     expanded_idx_mapping, expanded_local_pos, temperature, seed,
                     num_speculative_steps, use_fp64=False):
    assert target_logits.isinf().any(), "the filters came first"
    return None, torch.full((len(cu_num_logits) - 1,), 3)
""",
    "vllm/v1/worker/gpu/sample/gumbel.py": """
from vllm.triton_utils import HAS_TRITON
def apply_temperature(logits, expanded_idx_mapping, temperature):
    logits /= temperature[expanded_idx_mapping.long()][:, None]
""",
    "vllm/v1/sample/ops/topk_topp_triton.py": """
from vllm.platforms import current_platform
from vllm.utils.math_utils import next_power_of_2
def apply_top_k_top_p_triton(logits, k, p, mask_value=float("-inf")):
    assert not current_platform.is_xpu() and next_power_of_2(3) == 4
    return logits.masked_fill(logits < logits.topk(int(k[0])).values[:, -1:], mask_value)
""",
    "vllm/utils/math_utils.py": "def next_power_of_2(n): return 1 << (n - 1).bit_length()",
}


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test makes importable is gone after it."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("no_vllm")
def test_vllm_is_found_by_its_source_files_alone(
    tmp_path: Path, batch: rivals.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    for name, text in FAKES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv(vllm_sources.VARIABLE, str(tmp_path))
    rival = rivals.verifiers(replace(batch, temperature=0.7, top_k=5))[0]
    assert rival.call is not None, rival.reason
    assert rival.call().tolist() == [2] * 4


@pytest.mark.usefixtures("no_vllm")
def test_a_folder_without_vllm_is_said(
    tmp_path: Path, batch: rivals.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vllm_sources.VARIABLE, str(tmp_path))
    rival = rivals.verifiers(batch)[0]
    assert rival.call is None
    assert "holds no vllm/v1" in rival.reason


def test_vllm_gets_the_rows_as_it_wants_them(
    batch: rivals.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that reads its arguments as vLLM 0.33 does, greedily."""

    def rejection_sample(
        target_logits: Any,
        draft_logits: Any,
        draft_sampled: Any,
        cu_num_logits: Any,
        pos: Any,
        idx_mapping: Any,
        expanded_idx_mapping: Any,
        expanded_local_pos: Any,
        temperature: Any,
        seed: Any,
        num_speculative_steps: int,
        use_fp64: bool = False,
    ) -> Any:
        best = target_logits.argmax(-1)
        sampled = []
        for start, stop in zip(
            cu_num_logits[:-1].tolist(), cu_num_logits[1:].tolist(), strict=True
        ):
            assert expanded_local_pos[start:stop].tolist() == list(range(stop - start))
            assert len(set(expanded_idx_mapping[start:stop].tolist())) == 1
            kept = (best[start : stop - 1] == draft_sampled[start + 1 : stop]).long()
            sampled.append(kept.cumprod(0).sum() + 1)
        return None, torch.stack(sampled)

    gumbel = {"apply_temperature": lambda logits, expanded_idx_mapping, temperature: None}
    fake_module(monkeypatch, "vllm.v1.worker.gpu.sample.gumbel", **gumbel)
    module = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
    root = sys.modules["vllm.v1.worker.gpu.sample.gumbel"]
    fake_module(monkeypatch, module, rejection_sample=rejection_sample)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.gumbel", root)
    batch.draft_tokens[0] = batch.target_logits[0, :2].argmax(-1)
    batch.draft_tokens[1, 0] = batch.target_logits[1, 0].argmax(-1)
    rival = rivals.verifiers(batch)[0]
    assert rival.call is not None, rival.reason
    ours = verify(
        batch.draft_tokens,
        batch.draft_logits,
        batch.target_logits,
        RowSettings(torch.zeros(4), torch.arange(4), torch.zeros(4, dtype=torch.int64)),
        lengths=torch.full((4,), 2),
    )
    assert rival.call().tolist() == ours.num_accepted.tolist()
    assert ours.num_accepted[0] == 2
