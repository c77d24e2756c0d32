"""Centres taken out of rows: no answer changes, the rest is smaller, and what is done to tables is done to both."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pennyweight.accelerate.compile import export, plain
from pennyweight.compress.aware import TrainRounded
from pennyweight.compress.distill import Distill
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.residual import SubtractCentres
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.residual import Residual
from pennyweight.model.spec import Model, call
from pennyweight.model.transform import Env, plan


@pytest.fixture(scope="module")
def clustered(given: Bundle) -> Bundle:
    """Items in 12 clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 16, generator=generator)
    rows = centres[torch.randint(12, (900,), generator=generator)] + 0.3 * torch.randn(900, 16, generator=generator)
    rows[0] = 0
    return given.replace(model=Model(given.model.spec, {**given.model.state, "item.weight": rows}))


def outputs(bundle: Bundle, env: Env) -> torch.Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(env.allow), next(env.valid.batches(400)), bundle.model.spec.inputs)


SPLIT = SubtractCentres(codes=16, only=("item",))


def test_no_answer_changes_and_the_rest_is_small(clustered: Bundle, env: Env, tmp_path: Path) -> None:
    split = SPLIT.apply(clustered, env)
    assert torch.allclose(outputs(split, env), outputs(clustered, env), atol=1e-5)
    rest, whole = split.model.state["item.rest.weight"], clustered.model.state["item.weight"]
    assert rest.square().sum() < 0.2 * whole.square().sum()
    table = split.model.build(env.allow).item
    assert torch.allclose(table.weight, whole, atol=1e-6) and not table(torch.tensor([0])).any()
    assert torch.equal(outputs(load(save(split, tmp_path / "split")), env), outputs(split, env))
    layer = split.model.spec.layers["item"]
    assert layer == Residual(900, 16, 1, 16, 0) and layer.bytes() == split.model.state["item.codes"].nbytes


def test_codes_of_the_rest_lose_less_than_codes_of_the_rows(clustered: Bundle, env: Env) -> None:
    """One byte for the centre and three for the rest, against four for the row."""
    three, four = (ShareRows(parts=p, codes=64, only=("item*",), skip=s) for p, s in ((3, ("*.centres",)), (4, ())))
    split = plan(SubtractCentres(codes=64, only=("item",)), dataclasses.replace(three, only=("item.rest",), skip=()))
    apart, together = split.apply(clustered, env), four.apply(clustered, env)
    whole = clustered.model.state["item.weight"]
    far = [(b.model.build(env.allow).item.weight - whole).square().sum() for b in (apart, together)]
    assert far[0] < 0.8 * far[1]


def test_both_parts_are_tables_and_leave_for_other_runtimes(clustered: Bundle, env: Env) -> None:
    small = plan(SPLIT, QuantizeTables("int4", only=("*.rest",)), QuantizeTables("int8", only=("*.centres",)))
    split = small.apply(clustered, env)
    assert split.bytes < clustered.bytes
    batch, inputs = next(env.valid.batches(50)), split.model.spec.inputs
    module = split.model.build(env.allow)
    with torch.inference_mode():
        assert torch.allclose(call(plain(module), batch, inputs), call(module, batch, inputs), atol=1e-5)
        assert torch.allclose(
            export(module, batch, inputs).scorer(1)(batch).squeeze(-1), call(module, batch, inputs), atol=1e-4
        )


def test_rest_and_centres_learn_together(clustered: Bundle, env: Env) -> None:
    split = SPLIT.apply(clustered, env)
    training = Distill(epochs=1, lr=0.001)
    small = TrainRounded("int4", only=("*.rest",), training=training).apply(split, env)
    assert not torch.equal(small.model.state["item.centres.weight"], split.model.state["item.centres.weight"])
    assert small.model.state["item.rest.packed"].dtype == torch.uint8
    assert not small.model.build(env.allow).item(torch.tensor([0])).any()


def test_what_has_no_room_for_centres_is_said(clustered: Bundle, env: Env) -> None:
    with pytest.raises(
        PlanError, match=r"no full fp32 table has 512 rows for 256 centres; tables: user \(full fp32, 300 x 16\)"
    ):
        SubtractCentres(only=("user",)).apply(clustered, env)
    with pytest.raises(PlanError, match="no full fp32 table has 32 rows"):
        dataclasses.replace(SPLIT, only=("item.*",)).apply(SPLIT.apply(clustered, env), env)
    for wrong in ({"books": 0}, {"codes": 257}):
        with pytest.raises(ConfigError, match="books"):
            SubtractCentres(**wrong)
    with pytest.raises(ConfigError, match="at least 1 book of 2 to 256 codes, got 0 of 256"):
        Residual(10, 4, 0)
