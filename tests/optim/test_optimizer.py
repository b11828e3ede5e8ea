"""Each update rule in one process and without DeepSpeed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from osp.config import OptimizerConfig
from osp.model.build_norms import build_norm
from osp.model_config import Heads
from osp.optim.groups import build_groups
from osp.optim.optimizer import PartitionedOptimizer, momentum_pass, update_pass
from osp.optim.rules import RULES, Group, WholeRule
from tests.optim.reference import OneRole, osp_direction

CONFIG = OptimizerConfig(lr=0.125, adam_lr=0.01, weight_decay=0.0, ns_dtype="fp32")


def build(
    parameters: dict[str, nn.Parameter], role: str, config: OptimizerConfig, heads: dict[str, Heads] | None = None
) -> tuple[PartitionedOptimizer, list[Tensor]]:
    """Return an optimizer on flat copies of the parameters, as ZeRO makes them, and the copies."""
    groups = build_groups(OneRole(parameters, role, heads), config)
    flats = [torch.cat([p.detach().flatten() for p in group["params"]]) for group in groups]
    flats = [torch.cat([flat, flat.new_zeros(flat.numel() % 2)]) for flat in flats]
    optimizer = PartitionedOptimizer(groups)
    optimizer.bind(flats, stage=1)
    for group, flat in zip(optimizer.param_groups, flats, strict=True):
        group["params"] = [flat]
    return optimizer, flats


def step(optimizer: PartitionedOptimizer, flats: list[Tensor], grads: dict[str, Tensor], number: int) -> None:
    for group, flat in zip(optimizer.param_groups, flats, strict=True):
        values = torch.cat([grads[name].flatten() for name in group["names"]])
        flat.grad = torch.cat([values, values.new_zeros(flat.numel() - values.numel())])
        before = flat.grad.clone()
        optimizer.set_step(number, 1.0)
        single, optimizer.param_groups = optimizer.param_groups, [group]
        optimizer.step()
        optimizer.param_groups = single
        assert torch.equal(flat.grad, before), "the rule must not change the gradient"


def weights(optimizer: PartitionedOptimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    flattened = {name: tensors["weight"] for name, _, _, tensors in optimizer.local_state()}
    return {name: flattened[name].view(p.shape) for name, p in parameters.items()}


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_orthogonalization_the_rule_is_sgd_bit_for_bit(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sgd(WholeRule):
        def direction(self, stack: Tensor, group: Group) -> Tensor:
            return stack

        def scale(self, group: Group) -> float:
            return 1.0

    monkeypatch.setitem(RULES, "muon", Sgd)
    parameters = {f"p{i}": nn.Parameter(integers(4, 5, seed=i)) for i in range(3)}
    twins = [nn.Parameter(p.detach().clone()) for p in parameters.values()]
    optimizer, flats = build(parameters, "matrix", replace(CONFIG, nesterov=nesterov))
    sgd = torch.optim.SGD(twins, lr=CONFIG.lr, momentum=CONFIG.momentum, nesterov=nesterov)
    for number in range(1, 6):
        grads = {name: integers(4, 5, seed=100 * number + i) for i, name in enumerate(parameters)}
        for twin, grad in zip(twins, grads.values(), strict=True):
            twin.grad = grad.clone()
        sgd.step()
        step(optimizer, flats, grads, number)
        for twin, value in zip(twins, weights(optimizer, parameters).values(), strict=True):
            assert torch.equal(twin, value), number


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch_bit_for_bit(decay: float) -> None:
    parameters = {f"p{i}": nn.Parameter(integers(4, 5 + i, seed=i)) for i in range(3)}
    optimizer, flats = build(parameters, "embedding", replace(CONFIG, weight_decay=decay))
    twin = nn.Parameter(flats[0].detach().clone())
    options = {"lr": CONFIG.adam_lr, "betas": CONFIG.adam_betas, "eps": CONFIG.adam_eps, "weight_decay": decay}
    adamw = torch.optim.AdamW([twin], fused=True, **options)
    plain_twin = nn.Parameter(flats[0].detach().clone())
    plain = torch.optim.AdamW([plain_twin], fused=False, foreach=False, **options)
    for number in range(1, 8):
        grads = {name: integers(*p.shape, seed=100 * number + i) for i, (name, p) in enumerate(parameters.items())}
        step(optimizer, flats, grads, number)
        twin.grad = plain_twin.grad = flats[0].grad
        adamw.step()
        plain.step()
        assert torch.equal(twin, flats[0]), number
        torch.testing.assert_close(flats[0], plain_twin.detach(), atol=1e-6, rtol=1e-6)


def test_muon_equals_torch_up_to_bf16() -> None:
    """torch averages (buf = 0.05 g + 0.95 buf) where OSP sums; Newton-Schulz does not see the factor."""
    parameters = {"square": nn.Parameter(torch.randn(32, 32)), "wide": nn.Parameter(torch.randn(32, 64))}
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer, flats = build(parameters, "matrix", replace(CONFIG, lr=0.01, weight_decay=0.1, ns_dtype="bf16"))
    muon = torch.optim.Muon(
        list(twins.values()), lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for number in range(1, 4):
        grads = {name: torch.randn(p.shape) for name, p in parameters.items()}
        for name, twin in twins.items():
            twin.grad = grads[name].clone()
        muon.step()
        step(optimizer, flats, grads, number)
    for name, value in weights(optimizer, parameters).items():
        twin = twins[name].detach()
        error = float((value - twin).norm() / (twin - start[name]).norm())
        assert error < 0.02, (name, error)


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (7, 5), (9,), (1,)])
def test_rules_equal_the_formulas_of_the_paper(shape: tuple[int, ...]) -> None:
    parameters = {f"p{i}": nn.Parameter(torch.randn(shape)) for i in range(3)}
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    buffers = {name: torch.zeros(shape) for name in parameters}
    optimizer, flats = build(parameters, "matrix" if len(shape) == 2 else "gain", replace(CONFIG, weight_decay=0.2))
    for number in range(1, 4):
        grads = {name: torch.randn(shape) for name in parameters}
        step(optimizer, flats, grads, number)
        for name, p in expected.items():
            p -= CONFIG.lr * (osp_direction(grads[name], buffers[name]) + 0.2 * p)
    for name, value in weights(optimizer, parameters).items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["normalized", "adamw"])
def test_lambda_and_gains_shrink_by_their_own_decay(rule: str) -> None:
    """Without a gradient only decay is left: (1 - lr decay)^3; the default is the decay of all."""
    norm = build_norm("bhyt", 4, lam=3.0, init=2.0)
    parameters = dict(norm.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    assert start.keys() == {"lam", "weight"}
    config = replace(CONFIG, weight_decay=0.5, rules=CONFIG.rules | {"gain": rule})
    lr = CONFIG.lr if rule == "normalized" else 0.01
    for given, decay in ((None, 0.5), (0.0, 0.0), (0.2, 0.2)):
        optimizer, flats = build(parameters, "gain", replace(config, gain_decay=given))
        for number in range(1, 4):
            step(optimizer, flats, {name: torch.zeros_like(p) for name, p in parameters.items()}, number)
        for name, value in weights(optimizer, parameters).items():
            torch.testing.assert_close(value, start[name] * (1 - lr * decay) ** 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("shape", "heads"), [((6, 8), Heads(3, 0)), ((8, 8), Heads(2, 1)), ((5, 12), Heads(2, 1))])
def test_per_head_update_equals_muon_on_each_head(shape: tuple[int, int], heads: Heads) -> None:
    """Two matrices with heads and two of the same shape without; updates of RMS 0.2, whatever the head's size."""
    parameters = {name: nn.Parameter(torch.randn(shape)) for name in ("a", "b", "whole", "other")}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    config = replace(CONFIG, per_head=True, ns_coefficients="cubic", ns_steps=60)
    optimizer, flats = build(parameters, "matrix", config, {"a": heads, "b": heads})
    assert [group["names"] for group in optimizer.param_groups] == [["a", "b"], ["whole", "other"]]
    grads = {name: torch.randn(shape) for name in parameters}
    step(optimizer, flats, grads, 1)
    for name, value in weights(optimizer, parameters).items():
        count, dim = heads if name in ("a", "b") else (1, 0)
        update = (start[name] - value) / CONFIG.lr
        for block, gradient in zip(update.chunk(count, dim), grads[name].chunk(count, dim), strict=True):
            u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
            torch.testing.assert_close(block.double(), 0.2 * max(block.shape) ** 0.5 * u @ vt, atol=1e-4, rtol=1e-4)
            assert block.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)


def test_scalar_gain_moves_by_a_fifth_of_the_learning_rate() -> None:
    parameters = {"scale": nn.Parameter(torch.ones(1))}
    optimizer, flats = build(parameters, "gain", CONFIG)
    step(optimizer, flats, {"scale": torch.tensor([-1e-3])}, 1)
    assert flats[0][0].item() == pytest.approx(1 + 0.2 * CONFIG.lr, rel=1e-6)


def test_step_before_the_first_set_step_is_a_no_op() -> None:
    parameters = {"p": nn.Parameter(torch.randn(4, 4))}
    optimizer, flats = build(parameters, "matrix", replace(CONFIG, weight_decay=0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0]
    before = flats[0].clone()
    flats[0].grad = torch.ones_like(flats[0])
    optimizer.step()
    assert torch.equal(flats[0], before)
    assert all(not state.any() for tensors in optimizer.state.values() for state in tensors.values())


def test_deepspeed_does_not_enable_its_own_muon() -> None:
    parameters = {"p": nn.Parameter(torch.randn(4, 4))}
    optimizer, _ = build(parameters, "matrix", CONFIG)
    assert "muon" not in type(optimizer).__name__.lower()
    assert not hasattr(parameters["p"], "use_muon")


@pytest.mark.parametrize("role", ["matrix", "gain", "embedding"])
def test_recorded_squares_equal_the_update(role: str) -> None:
    shape = (9,) if role == "gain" else (4, 6)
    parameters = {f"p{i}": nn.Parameter(torch.randn(shape)) for i in range(2)}
    optimizer, flats = build(parameters, role, CONFIG)
    for number in range(1, 4):
        before = flats[0].clone()
        flats[0].grad = torch.randn_like(flats[0])
        optimizer.set_step(number, 0.5, record=number == 3)
        optimizer.step()
    squares = float(optimizer.update_squares[role])
    assert squares == pytest.approx(float((flats[0] - before).square().sum()), rel=1e-4)
    assert float(optimizer.parameter_squares()[role]) == pytest.approx(float(flats[0].square().sum()), rel=1e-5)
    optimizer.set_step(4, 0.5)
    optimizer.step()
    assert optimizer.update_squares == {}


def test_clip_multiplies_the_gradient_of_every_rule() -> None:
    """A step with `clip` equals a step with the multiplied gradient, for AdamW, Muon and the rule of gains."""
    for role, shape in (("embedding", (6, 8)), ("matrix", (6, 8)), ("gain", (7,))):
        after = []
        for clip in (1.0, 0.25):  # a power of 2: exact
            parameters = {str(i): nn.Parameter(integers(*shape, seed=i)) for i in range(3)}
            optimizer, flats = build(parameters, role, CONFIG)
            for number in range(1, 4):
                values = integers(flats[0].numel(), seed=number)
                flats[0].grad = values if clip < 1 else 0.25 * values
                optimizer.set_step(number, 1.0, clip=clip)
                optimizer.step()
            after.append(flats[0])
        assert torch.equal(*after), role


def test_compiled_passes_equal_eager_ones_and_compile_once() -> None:
    """Learning rate, clip factor and sizes change with steps and groups; none of them is compiled in."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        parameters = {f"{n}.{i}": nn.Parameter(integers(8, n, seed=i)) for n in (8, 24) for i in range(3)}
        groups = build_groups(OneRole(parameters, "matrix"), replace(CONFIG, weight_decay=0.1))
        flats = [torch.cat([p.detach().flatten() for p in group["params"]]) for group in groups]
        optimizer = PartitionedOptimizer(groups, compiled=compiled)
        optimizer.bind(flats, stage=1)
        for group, flat in zip(optimizer.param_groups, flats, strict=True):
            group["params"] = [flat]
        for number in range(1, 6):
            for flat in flats:
                flat.grad = integers(flat.numel(), seed=number)
            optimizer.set_step(number, 1 / number, clip=1 - 0.1 * number)
            optimizer.step()
        results.append(torch.cat([*flats, *(piece.state["momentum"] for piece in optimizer.pieces)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "two passes, one or two kinds of layout"


def test_compiled_passes_are_one_kernel_each() -> None:
    """So gradient, momentum and weight travel once: 16 and 10 bytes per parameter."""
    import torch._inductor.config
    from torch._inductor import metrics

    grad, buf, out = (integers(64, seed=seed) for seed in range(3))
    weights, update = integers(4, 8, 16, seed=3), integers(4, 16, 8, seed=4).bfloat16().mT
    with torch._inductor.config.patch(force_disable_caches=True):
        metrics.reset()
        torch.compile(momentum_pass, dynamic=True)(grad, buf, out, 0.5, 0.95, True)
        assert metrics.generated_kernel_count == 1
        torch.compile(update_pass, dynamic=True)(weights, update, 0.9, torch.full((), -0.1))
        assert metrics.generated_kernel_count == 2


def test_updates_wait_for_the_last_group() -> None:
    """DeepSpeed steps group by group; matrices of all groups travel together."""
    parameters = {f"{n}.{i}": nn.Parameter(integers(8, n, seed=i)) for n in (8, 24) for i in range(3)}
    optimizer, flats = build(parameters, "matrix", CONFIG)
    groups, before = optimizer.param_groups, [flat.clone() for flat in flats]
    optimizer.set_step(1, 1.0)
    for group, flat in zip(groups, flats, strict=True):
        assert all(map(torch.equal, flats, before))
        flat.grad = integers(flat.numel(), seed=1)
        optimizer.param_groups = [group]
        optimizer.step()
        flat.grad = None  # as DeepSpeed does
    assert not any(map(torch.equal, flats, before))
    assert not optimizer._grads, "kept beyond the step"
