"""What the soft-token chains are asked: the small world of chains, or the paper's Hub models and questions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from workbench.data import chains as world
from workbench.data.chains import Chains
from workbench.data.questions import boxed
from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained
from workbench.models.thinking import Format, Rollout, ends_with
from workbench.models.transformer import DecoderLM, LMConfig, llama_config, to_llama
from workbench.papers.soft_tokens_settings import Config
from workbench.training.loop import Recipe, fit
from workbench.training.record import Record


@dataclass
class Questions:
    """B prompts of ids (B, P), padded on the left, mask (B, P) bool, and their true answers as text."""

    ids: Tensor
    mask: Tensor
    truths: list[str]

    def to(self, device: Any, non_blocking: bool = False) -> "Questions":
        """A copy on `device`."""
        return Questions(self.ids.to(device), self.mask.to(device), self.truths)

    def __len__(self) -> int:
        return len(self.truths)


@dataclass(frozen=True)
class Task:
    """Questions with answers that can be checked.

    draw(generator, count, split) -> Questions: split "train", "validation" and "test" are of the skill that is
    trained, "other" of the held-out one. grade(answer, truth): is the text in the box right? knowledge(model): what
    is measured of the held-out skill without generating: {"nll": nats per token of the right answer, ...}.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    draw: Callable[[torch.Generator, int, str], Questions]
    grade: Callable[[str, str], bool]
    knowledge: Callable[[Any], dict[str, float]]
    limit: int
    answer_limit: int
    world: Chains | None = None

    def marks(self, chains: Rollout, questions: Questions) -> Tensor:
        """(N,) int64: 2 right, 1 boxed but wrong, 0 nothing boxed; G samples a question in a row."""
        ids = torch.where(chains.answer_mask, chains.answer, int(self.tokenizer.eos_token_id or 0))
        texts = self.tokenizer.batch_decode(ids.cpu(), skip_special_tokens=True)
        samples, known, out = len(texts) // len(questions), {}, []
        for i, text in enumerate(texts):
            key = text, questions.truths[i // samples]
            if key not in known:
                answer = boxed(text)
                known[key] = 0 if answer is None else 2 if self.grade(answer, key[1]) else 1
            out.append(known[key])
        return torch.tensor(out, device=ids.device)


def chains_task(config: Config, seed: int) -> Task:
    """The world of `seed`: "+" is trained, "-" held out; the operands of each split never meet those of another."""
    small = Chains(config.chain, config.floor, seed)
    tokenizer = world.tokenizer()
    box = world.ID[world.BOX]

    def draw(generator: torch.Generator, count: int, split: str) -> Questions:
        if count < 1:
            raise WorkbenchError("no questions were asked for: the prompt set is empty")
        operation, part = ("-", "test") if split == "other" else ("+", split)
        operands, operations = small.draw(generator, count, part, operation)
        ids = small.prompts(operands, operations)
        truths = [str(int(r)) for r in small.results(operands, operations)[:, -1]]
        return Questions(ids, torch.ones_like(ids, dtype=torch.bool), truths)

    @torch.no_grad()
    def knowledge(model: Any) -> dict[str, float]:
        operands, operations = small.draw(torch.Generator().manual_seed(seed), config.problems, "test", "-")
        texts = small.texts(operands, operations, small.results(operands, operations))[:, :-1]  # without <eos>
        logits = model(input_ids=texts.to(model.device)).logits[:, small.prompt_length - 1 : -1].float().cpu()
        targets = texts[:, small.prompt_length :]
        return {"nll": F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()}

    format = Format(
        ends_with([world.ID[world.MARKER]]), ends_with([world.ID[world.CLOSE]]), (box,),
        (world.ID[world.MARKER], box),
    )  # fmt: skip
    return Task(
        tokenizer, format, draw, lambda answer, truth: answer == truth, knowledge, config.thoughts,
        config.answer_tokens, small,
    )  # fmt: skip


def load_task(config: Config, seed: int = 0) -> Task:
    """The small world of `seed`, or the paper's questions for a Hub model (see soft_tokens_full)."""
    if config.data == "chains":
        return chains_task(config, seed)
    from workbench.papers.soft_tokens_full import full_task

    return full_task(config, load_pretrained(AutoTokenizer, config.model))


def small_base(config: Config, task: Task, seed: int, record: Record | None = None, **loop: Any) -> LlamaForCausalLM:
    """A DecoderLM trained by supervised learning on the imperfect writer's text, as a transformers Llama."""
    small = task.world
    assert small is not None
    context = small.length + config.thoughts
    shape = LMConfig(len(world.WORDS), context, config.width, 2 * config.width, 4, 4, config.layers)
    model = DecoderLM(shape).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.embedding.weight.mul_(1 / 0.02)  # N(0, 1): learns twice as fast here as N(0, 0.02)
    start = small.prompt_length

    def loss(m: Any, texts: Tensor) -> dict[str, Tensor]:
        logits = m(texts[:, :-1])[:, start - 1 :]  # the prompt's tokens are random: nothing to learn from them
        return {"loss": F.cross_entropy(logits.flatten(0, 1), texts[:, start:].flatten())}

    recipe = Recipe(steps=config.base_steps, lr=3e-3, warmup=0.02, schedule="cosine", clip=1.0, seed=seed)
    fit(model, loss, lambda g: small.corpus(g, 128), recipe, name=f"base {seed}", record=record, **loop)
    special = {"bos_token_id": world.ID["<bos>"], "eos_token_id": world.ID["<eos>"], "pad_token_id": world.ID["<eos>"]}
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(shape), **special))  # type: ignore[arg-type]
    llama.load_state_dict(to_llama(model))
    return llama.eval()


def save_model(model: Any, task: Task, folder: Path) -> Path:
    """A folder that transformers' from_pretrained opens, weights as safetensors, with the tokenizer."""
    disable_progress_bar()
    model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return folder


def load_base(config: Config, task: Task, seed: int = 0, folder: Path | None = None, **loop: Any) -> Any:
    """The model before reinforcement learning: trained here (kept under `folder`), or by Hub id or folder.

    Raises WorkbenchError where the model's vocabulary is smaller than the tokenizer's.
    """
    disable_progress_bar()
    if config.model != "small":
        model = load_pretrained(AutoModelForCausalLM, config.model, dtype=torch.float32)
    else:
        kept = folder / f"base-{seed}" if folder else None
        if kept and (kept / "config.json").exists():
            return load_pretrained(AutoModelForCausalLM, str(kept)).eval()
        model = small_base(config, task, seed, Record(folder / "bases") if folder else None, **loop)
        if kept:
            save_model(model, task, kept)
    check_vocabulary(model, task.tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raises WorkbenchError where the tokenizer has ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise WorkbenchError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings: they are of two vocabularies"
        )
