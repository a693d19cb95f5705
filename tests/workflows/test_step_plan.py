"""The plan of a step: its count of operations, and what the TPU's compiler says of a small one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.errors import TrainingError
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.parallel import make_mesh
from composable.parallel.program import measure_program
from composable.training.config import TrainConfig
from composable.training.loop import lower_step
from composable.training.objectives import backbone_objective, expert_objective
from composable.training.optimizers import adamw
from composable.workflows.step_plan import (
    compile_to_fit,
    count_backbone_flops,
    count_expert_flops,
)

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
# Short rows, so that attention, which computes whole blocks, is a small part.
TRAINING = TrainConfig(steps=2, batch_size=2, window=8, learning_rate=1e-3)
BY_HAND = 0.05


def flops_per_token(objective, trained, frozen):
    """Return the operations of the step that is compiled for this machine.

    Its arguments take the memory of all arrays, also of frozen ones that a full body replaces.
    """
    rows = jax.ShapeDtypeStruct((TRAINING.batch_size, TRAINING.window + 1), jnp.int32)
    optimizer = adamw(TRAINING)
    lowered = lower_step(objective, trained, frozen, rows, optimizer=optimizer, mesh=make_mesh())
    cost = measure_program(lowered.compile())
    arrays = jax.tree.leaves((trained, jax.eval_shape(optimizer.init, trained), frozen, rows))
    assert cost.arguments == pytest.approx(sum(a.size * a.dtype.itemsize for a in arrays), rel=1e-3)
    return cost.flops / (TRAINING.batch_size * TRAINING.window)


@pytest.fixture(scope="module")
def cfg(tiny):
    """Return an architecture as wide as products are that an expert's step keeps."""
    return dataclasses.replace(tiny.cfg, d_model=64, d_ff=128)


@pytest.fixture(scope="module")
def backbone(cfg):
    return nnx.eval_shape(lambda: Backbone(cfg, np.arange(256), 256, rngs=nnx.Rngs(0)))


def test_the_operations_of_a_backbone_are_those_counted_by_hand(cfg, backbone):
    graph, params, rest = nnx.split(backbone, nnx.Param, ...)
    found = flops_per_token(backbone_objective(graph), params, rest)
    expected = count_backbone_flops(cfg, 256, TRAINING.window)
    assert found == pytest.approx(expected, rel=BY_HAND)


@pytest.mark.parametrize("rank", [None, 4], ids=["ffn", "low-rank"])
def test_the_operations_of_an_expert_are_those_counted_by_hand(cfg, backbone, rank):
    kind = "ffn" if rank is None else "lora"
    settings = {"kind": kind, "rank": rank, "scout_width": 8}
    expert = nnx.eval_shape(lambda own: Expert(own, **settings, rngs=nnx.Rngs(0)), backbone)
    graph, params = nnx.split(expert)
    found = flops_per_token(expert_objective(graph), params, backbone)
    expected = count_expert_flops(cfg, rank, (8, 256), TRAINING.window)
    assert found == pytest.approx(expected, rel=BY_HAND)


def test_a_program_that_the_compiler_refuses_names_the_memory():
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: total 104.11G exceeds 95.74G")

    with pytest.raises(TrainingError, match=r"does not fit: .*104\.11G") as caught:
        compile_to_fit(Refused(), "v5p:4x4x4")
    assert (caught.value.where, "--accumulate" in caught.value.hint) == ("v5p:4x4x4", True)


@pytest.mark.parity
def test_a_plan_on_tpus(trained_folder, loaded, tmp_path):
    """Weights are gathered and gradients summed; the batch is not gathered."""
    folder = tmp_path / "logic"
    shutil.copytree(trained_folder, folder)
    command = [sys.executable, "-m", "composable.cli", "train", folder]
    options = ["--backbone", loaded.folder, "--rows", "4", "--window", "16", "--json"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, *options, "--plan", "v5e:2x2"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads(done.stdout[done.stdout.index("{") :])
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "expert": 1}
    assert plan["fits"]
    assert plan["cost"]["arguments"] < plan["cost"]["peak"] < plan["chip_memory"]
    # Of 64 tokens a step; the products of Muon are as many for any number of tokens.
    assert 0.9 < plan["recomputation"] < 4
    assert {"all-gather"} <= plan["cost"]["collectives"].keys()


def test_without_a_topology_that_exists_nothing_is_compiled(trained_folder, loaded):
    from typer.testing import CliRunner

    from composable.cli.app import app

    command = ["train", str(trained_folder), "--backbone", str(loaded.folder), "--plan", "v9:2x2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "v4, v5e, v5p, v6e" in done.output
