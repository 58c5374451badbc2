"""The estimate against what the CPU allocator of torch reports for a real step, and against arithmetic."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig

from dlm_tune.models import LLaDAConfig, load_model
from dlm_tune.models.adapters import complete_peft_config
from dlm_tune.models.memory import StepSetup, count_parameters, estimate_step_memory, optimizer_state_bytes
from tests.tiny_models import MASK_ID, save_tiny_checkpoint, tiny_dream, tiny_llada

B, L = 4, 64
LORA = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
LARGER = {
    tiny_llada: {"d_model": 64, "mlp_hidden_size": 160, "n_layers": 3},
    tiny_dream: {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "max_window_layers": 3},
}


def allocated_peak(step) -> int:
    """Largest number of bytes that torch's CPU allocator held above the start, from its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def real_step(model, setup: StepSetup):
    """One forward and backward through the model's own forward, masked as in training."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (setup.num_sequences, setup.length), generator=generator)
    masked = torch.ones_like(ids, dtype=torch.bool)
    attention_mask = torch.ones_like(ids)
    if setup.has_mask:
        attention_mask[0, -1] = 0
        masked[0, -1] = False
    weights = torch.rand(ids.shape, generator=generator)
    noisy = ids.masked_fill(masked, MASK_ID)

    def step() -> None:
        context = torch.autocast(
            "cpu", setup.autocast_dtype or torch.bfloat16, enabled=setup.autocast_dtype is not None
        )
        with context:
            loss = model(
                input_ids=noisy,
                attention_mask=attention_mask,
                target_ids=ids,
                target_mask=masked,
                target_weights=weights,
            ).loss
        loss.backward()

    return step


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"has_mask": False},
        {"gradient_checkpointing": True},
        {"accumulates": True},
        {"autocast_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16},
        {"peft_config": LORA},
        {"peft_config": LORA, "gradient_checkpointing": True},
        {"peft_config": LORA, "autocast_dtype": torch.bfloat16},
        {"peft_config": LORA | {"lora_dropout": 0.1}},
        {"peft_config": LORA, "dtype": torch.bfloat16},
        {"attn_implementation": "eager"},
        {"tied": True},
        {"peft_config": LORA | {"modules_to_save": ["lm_head"]}},
        {"peft_config": LORA | {"target_modules": [*LORA["target_modules"], "lm_head"]}},
    ],
    ids=lambda settings: ",".join(settings) or "full",
)
def test_peak_of_forward_and_backward_is_that_of_the_allocator(make_model, settings):
    settings = dict(settings)
    peft, tied = settings.pop("peft_config", None), settings.pop("tied", False)
    num_targets = B * L - settings.get("has_mask", True)
    setup = StepSetup(B, L, num_targets, peft_config=LoraConfig(**peft) if peft else None, **settings)
    model = make_model(**LARGER[make_model], tie_word_embeddings=tied).to(setup.dtype)
    model.set_attn_implementation(setup.attn_implementation or "sdpa")
    config = model.config
    estimate = estimate_step_memory(config, setup)

    if setup.peft_config is not None:
        model = get_peft_model(model, LoraConfig(**peft))
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if peft:
            model.enable_input_require_grads()
    model.train()
    step = real_step(model, setup)
    step()  # buffers that are made once
    expected = 0
    if setup.accumulates:
        expected = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    else:
        model.zero_grad(set_to_none=True)
    expected += allocated_peak(step)
    assert sum(estimate.peak.values()) == pytest.approx(expected, rel=0.05)
    parameters = list(model.parameters())
    assert estimate.weights == sum(parameter.nbytes for parameter in parameters)
    assert estimate.num_trainable == sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def test_chunks_of_the_head_are_counted(monkeypatch):
    """Smaller chunks take less memory, as in a real step."""
    sizes = {}
    for chunk in (2**20, 2**15):
        monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", chunk)
        setup = StepSetup(B, L, B * L, has_mask=False, gradient_checkpointing=True)
        model = tiny_llada(d_model=16, mlp_hidden_size=32, n_layers=1, vocab_size=4096)
        config = model.config
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        step = real_step(model.train(), setup)
        step()
        model.zero_grad(set_to_none=True)
        sizes[chunk] = sum(estimate_step_memory(config, setup).peak.values())
        assert sizes[chunk] == pytest.approx(allocated_peak(step), rel=0.05)
    assert sizes[2**15] < 0.5 * sizes[2**20]


def llada_8b() -> LLaDAConfig:
    return LLaDAConfig(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081)


def test_parameters_of_llada_8b():
    d, layers, mlp, vocab = 4096, 32, 12288, 126464
    expected = 2 * vocab * d + layers * (4 * d * d + 3 * d * mlp + 2 * d) + d
    assert count_parameters(llada_8b()) == expected == 8_015_581_184


def test_quantised_8b_with_an_adapter():
    """Arithmetic: 4-bit linear layers, tables and norms in bf16, adapter with gradient and Adam in float32."""
    adapter = LoraConfig(r=128, target_modules=["q_proj", "k_proj", "v_proj"])
    setup = StepSetup(
        1, 64, 64, dtype=torch.bfloat16, quantization="4bit", peft_config=adapter, gradient_checkpointing=True
    )
    config = llada_8b()
    config.n_layers = 2  # of 32, for the time
    estimate = estimate_step_memory(config, setup)
    linear = 2 * (4 * 4096**2 + 3 * 4096 * 12288)
    num_adapter = 128 * (4096 + 4096) * 3 * 2
    rest = 2 * (count_parameters(config) - linear)
    assert estimate.weights == pytest.approx(linear * (0.5 + 1 / 64 + 1 / 4096) + rest + 4 * num_adapter, rel=1e-6)
    assert estimate.gradients == 4 * num_adapter
    assert estimate.optimizer_state == 8 * num_adapter
    assert estimate.num_trainable == num_adapter


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and of what bitsandbytes keeps beside them, each storage once."""
    tensors = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        beside = [value for part in (parameter, state, nested) for value in getattr(part, "__dict__", {}).values()]
        for tensor in (parameter, *filter(torch.is_tensor, beside)):
            tensors[tensor.data_ptr()] = tensor.nbytes
    return sum(tensors.values())


@pytest.mark.parametrize("quantization", ["nested", "4bit", "8bit"])
def test_quantised_step_is_that_of_bitsandbytes(quantization, tmp_path):
    """Real weights, and a real step with the layers in bfloat16; beside them a table of about a KB for each layer."""
    pytest.importorskip("bitsandbytes")
    save_tiny_checkpoint(tmp_path, d_model=512, mlp_hidden_size=1024, n_layers=2, n_heads=8, n_kv_heads=8)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization == "nested",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    adapter = LoraConfig(r=16)
    setup = StepSetup(
        4, 64, 4 * 64 - 4, dtype=torch.bfloat16, autocast_dtype=torch.bfloat16, peft_config=adapter,
        quantization="8bit" if quantization == "8bit" else "4bit", double_quantization=quantization == "nested",
        gradient_checkpointing=True,
    )  # fmt: skip
    model = load_model(tmp_path, dtype=torch.bfloat16, quantization="8bit" if quantization == "8bit" else four_bits)
    estimate = estimate_step_memory(model.config, setup)
    model = get_peft_model(model, complete_peft_config(adapter, model))
    assert 0 <= held_bytes(model) - estimate.weights < 2 * 7 * 1200
    if quantization == "8bit":  # whose kernels for the CPU hold copies that those of a GPU do not
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    step = real_step(model.train(), setup)
    step()
    model.zero_grad(set_to_none=True)
    assert sum(estimate.peak.values()) == pytest.approx(allocated_peak(step), rel=0.05)


@pytest.mark.parametrize(
    ("optim", "bytes_per_parameter"),
    [
        ("adamw_torch", 8),
        ("adamw_torch_fused", 8),
        ("paged_adamw_32bit", 8),
        ("adamw_bnb_8bit", 2 * (1 + 4 / 256)),
        ("paged_adamw_8bit", 2 * (1 + 4 / 256)),
        ("lion_8bit", 1 + 4 / 256),
        ("sgd", 0),
        ("adagrad", 4),
        ("rmsprop", 4),
    ],
)
def test_optimiser_state_is_known(optim, bytes_per_parameter):
    weight = nn.Parameter(torch.empty(256, 128))
    assert optimizer_state_bytes(optim, [weight]) == int(256 * 128 * bytes_per_parameter)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_optimiser_state_is_that_of_the_real_optimiser(optim, tmp_path):
    """The optimiser is made by transformers from its name, as in training."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llada(n_layers=1)
    arguments = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    expected = sum(value.nbytes for value in held if value.dim() > 0)
    assert optimizer_state_bytes(optim, list(model.parameters())) == expected


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("foreach", [False, True])
def test_temporaries_of_the_update_are_those_of_the_real_optimiser(optim, foreach):
    """`foreach` is what torch chooses on an accelerator; it runs on the CPU too."""
    classes = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    is_fused = optim == "adamw_torch_fused"
    if is_fused and foreach:
        pytest.skip("fused and foreach exclude each other")
    model = tiny_llada(d_model=128, mlp_hidden_size=256, n_layers=2)
    settings = {"fused": True} if is_fused else {"foreach": foreach}
    optimizer = classes.get(optim, torch.optim.AdamW)(model.parameters(), lr=1e-3, **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the state
    estimate = estimate_step_memory(model.config, StepSetup(1, 8, 8, optim=optim, on_accelerator=foreach))
    tolerance = 0.02 * estimate.gradients  # scalars of each parameter
    if foreach:
        assert abs(estimate.optimizer_update - allocated_peak(optimizer.step)) < tolerance
    else:  # Adagrad and RMSprop need fewer
        assert estimate.optimizer_update > allocated_peak(optimizer.step) - tolerance
        assert estimate.optimizer_update <= 3 * max(parameter.nbytes for parameter in model.parameters())


def test_unknown_optimiser_state_is_none():
    assert optimizer_state_bytes("galore_adamw", [nn.Parameter(torch.empty(2))]) is None


def test_small_tensors_are_not_quantised_by_8_bit_optimisers():
    assert optimizer_state_bytes("adamw_8bit", [nn.Parameter(torch.empty(4095))]) == 2 * 4 * 4095


def test_phases_add_up():
    """The phases add up to the fields, and the larger one is the total."""
    estimate = estimate_step_memory(tiny_llada().config, StepSetup(2, 32, 64))
    forward, update = (sum(terms.values()) for terms in estimate.phases.values())
    assert estimate.total == max(forward, update)
    assert update == estimate.weights + estimate.optimizer_state + estimate.gradients + estimate.optimizer_update
    assert estimate.gradients == estimate.weights == 4 * estimate.num_parameters
