"""LinFusion at the paper's own sizes (meta device), and what attaches to a student: LoRA, ControlNet, patches."""

import copy

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from workbench.errors import WorkbenchError
from workbench.models.adapters import add_lora, attach_lora, lora_state
from workbench.models.denoisers import no_prompt, small_unet
from workbench.models.generalised_attention import Mixer, replace_self_attention, self_attentions, train_only
from workbench.models.patch_parallel import PatchParallel
from workbench.models.released_linfusion import load_student, save_student, student_state

# the public unet/config.json files, as far as they differ from diffusers' defaults
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "parameters", "layers", "heads", "rank", "extra"),
    [
        # extra by hand: a layer's f' and g' have 2 (2 d r + 3 r + d) parameters
        (SD15, 859_520_964, {320: 5, 640: 5, 1280: 6}, {8}, None, 49_661_440),
        (SDXL, 2_567_463_684, {640: 10, 1280: 60}, {10, 20}, 1 / 16, 25_797_600),
    ],
    ids=["SD-1.5", "SDXL"],
)
def test_the_real_unets(config, parameters, layers, heads, rank, extra):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert count(unet) == parameters
    softmax = [name for name, module in unet.named_modules() if name.endswith("attn1")]
    names = replace_self_attention(unet, Mixer(rank=rank))
    widths = [unet.get_submodule(name).to_q.in_features for name in names]
    assert names == softmax and {w: widths.count(w) for w in set(widths)} == layers
    assert {unet.get_submodule(name).heads for name in names} == heads
    assert count(unet) - parameters == extra
    assert extra == sum(2 * (2 * d * r + 3 * r + d) for d in widths for r in [d if rank is None else d // 16])
    trainable = train_only(unet, names)
    assert trainable and all(".attn1." in name for name in trainable)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trained == extra + sum(4 * d * d + d for d in widths)  # to_q, to_k, to_v without bias, to_out with one


@pytest.fixture(scope="module")
def teacher():
    return small_unet(seed=1).eval()


def student_of(teacher, **mixer):
    student = copy.deepcopy(teacher)
    replace_self_attention(student, Mixer(**mixer))
    return student


def inputs(seed=0, size=12, batch=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=g), torch.randint(0, 1000, (batch,), generator=g)


def call(unet, x, t, **kw):
    return unet(x, t, encoder_hidden_states=no_prompt(len(x)), return_dict=False, **kw)[0]


def effect(unet, run, x, t):
    with torch.no_grad():
        return run(unet, x, t) - call(unet, x, t)


def same_direction(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_a_lora_trained_on_the_teacher_works_on_the_student(teacher):
    host = copy.deepcopy(teacher)
    add_lora(host)
    trainable = [p for p in host.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=3e-2)
    for step in range(25):
        x, t = inputs(step, batch=4)
        loss = (
            call(host, x, t) - (call(teacher, x, t).detach() + torch.tensor([0.5, 0, -0.5])[:, None, None])
        ).square()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    state = lora_state(host)
    assert state and all("attn2" in key for key in state)
    student, x, t = student_of(teacher), *inputs(99)
    before = call(student, x, t).detach()
    attach_lora(student, state)
    assert all(torch.equal(a, state[key]) for key, a in lora_state(student).items()), "the adapter was changed"
    with torch.no_grad():
        on_student, on_teacher = call(student, x, t) - before, call(host, x, t) - call(teacher, x, t)
    assert on_teacher.norm() > 0.1 * before.norm() and same_direction(on_student, on_teacher) > 0.8
    student.disable_adapters()
    assert torch.equal(call(student, x, t), before)


def test_a_controlnet_trained_on_the_teacher_works_on_the_student(teacher):
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(teacher, conditioning_channels=3)
    optimizer = torch.optim.Adam(control.parameters(), lr=1e-2)

    def controlled(unet, x, t, hint=None):
        hint = torch.ones(len(x), 3, 96, 96) if hint is None else hint
        down, mid = control(x, t, no_prompt(len(x)), hint, return_dict=False)
        return call(unet, x, t, down_block_additional_residuals=down, mid_block_additional_residual=mid)

    x, t = inputs(99)
    assert torch.equal(controlled(teacher, x, t), call(teacher, x, t)), "an untrained branch must do nothing"
    for step in range(15):
        x, t = inputs(step, batch=2)
        with torch.no_grad():
            target = call(teacher, x, t) + 0.5
        loss = (controlled(teacher, x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, t = inputs(99)
    student = student_of(teacher)
    on_student, on_teacher = effect(student, controlled, x, t), effect(teacher, controlled, x, t)
    assert on_teacher.mean() > 0.1 and same_direction(on_student, on_teacher) > 0.8
    with torch.no_grad():
        other_hint = controlled(student, x, t, torch.randn(2, 3, 96, 96)) - call(student, x, t)
    assert not torch.allclose(other_hint, on_student), "the student does not hear the hint"


def patched(student, **settings):
    split = copy.deepcopy(student)
    patches = {}
    for name, layer in self_attentions(split).items():
        layer.patches = patches[name] = PatchParallel(**settings)
    return split, patches


def test_two_ranks_with_synchronous_statistics_equal_one(teacher):
    student, (x, t) = student_of(teacher), inputs(3)
    split, patches = patched(student, ranks=2)
    with torch.no_grad():
        assert (call(split, x, t) - call(student, x, t)).abs().max() < 1e-5
    for name, layer in self_attentions(split).items():
        d, h = layer.to_q.in_features, layer.heads
        width = d // h
        # both ranks send S (width x width) and s (width) of every head and image once, in float32
        assert patches[name].bytes_sent == 2 * len(x) * h * width * (width + 1) * 4
        tokens = 36 if d == 40 else 144
        assert patches[name].softmax_bytes == 2 * len(x) * tokens * d * 4
    with pytest.raises(WorkbenchError, match="equal strips"):
        call(patched(student, ranks=5)[0], x, t)


def test_stale_statistics_cost_less_the_smaller_the_step(teacher):
    student, (x, t) = student_of(teacher), inputs(4)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    errors = []
    for step in (0.4, 0.2, 0.1, 0.0):
        split, _ = patched(student, ranks=2, mode="stale", warmup=1)
        with torch.no_grad():
            call(split, x, t)  # the synchronous warm-up at the previous denoising step
            moved = x + step * direction
            errors.append((call(split, moved, t) - call(student, moved, t)).norm().item())
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2] and errors[2] > 1e-4
    assert errors[3] < 1e-4


def released(unet, rank_of):
    """Tensors as the authors' code saves them: module i in named_modules order, then diffusers' Attention keys."""
    g, state = torch.Generator().manual_seed(6), {}
    attentions = [m for name, m in unet.named_modules() if name.endswith("attn1")]
    for i, attention in enumerate(attentions):
        d = attention.to_q.in_features
        r = rank_of(d)
        shapes = {f"to_{n}.weight": (d, d) for n in "qkv"} | {"to_out.0.weight": (d, d), "to_out.0.bias": (d,)}
        for n in ("to_q_", "to_k_"):
            shapes |= {f"{n}.0.weight": (r, d), f"{n}.0.bias": (r,), f"{n}.1.weight": (r,), f"{n}.1.bias": (r,)}
            shapes |= {f"{n}.3.weight": (d, r), f"{n}.3.bias": (d,)}
        state |= {f"{i}.{key}": torch.randn(shape, generator=g) / d**0.5 for key, shape in shapes.items()}
    return state


@pytest.mark.parametrize("rank_of", [lambda d: d, lambda d: d // 8], ids=["r = d", "r = d / 8"])
def test_a_released_student_loads_by_its_own_keys(teacher, tmp_path, rank_of):
    state = released(teacher, rank_of)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    student = copy.deepcopy(teacher)
    names = load_student(student, str(tmp_path))
    assert student_state(student).keys() == state.keys() and len(names) == 4
    assert all(torch.equal(tensor, state[key]) for key, tensor in student_state(student).items())
    x, t = inputs(7)
    assert torch.isfinite(call(student, x, t)).all()
    save_student(student, tmp_path / "again")
    assert load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors").keys() == state.keys()
    again = copy.deepcopy(teacher)
    load_student(again, str(tmp_path / "again"))
    assert torch.equal(call(again, x, t), call(student, x, t))


def test_a_student_for_another_unet_is_refused_in_one_line(teacher, tmp_path):
    state = released(teacher, lambda d: d)
    (tmp_path / "wide").mkdir()
    save_file(state, tmp_path / "wide" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WorkbenchError, match="module 0 does not fit [^\n]*$"):
        load_student(small_unet((48, 80)), str(tmp_path / "wide"))
    save_file(
        {k: v for k, v in state.items() if not k.startswith("3.")}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(WorkbenchError, match="3 attention modules for a UNet with 4"):
        load_student(copy.deepcopy(teacher), str(tmp_path))
    with pytest.raises(WorkbenchError, match="still softmax"):
        save_student(teacher, tmp_path / "none")


def test_a_whole_student_survives_diffusers_own_saving(teacher, tmp_path):
    student = student_of(teacher, rank=4)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    student.save_pretrained(tmp_path)
    again = small_unet(seed=5).eval()
    replace_self_attention(again, Mixer(rank=4))
    again.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    x, t = inputs(8)
    assert torch.equal(call(again, x, t), call(student, x, t))
