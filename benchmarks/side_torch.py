"""The torch side of a comparison: `transformers` generate, and TRL's GRPO trainer, on the CPU.

Runs under an interpreter with torch and TRL 1.16; not run by hand: `against_torch.py` starts it; see turns.py.

What was chosen for them, each the fastest they have: f32 without gradient checkpointing; no KL and one step per batch of
responses, so that no forward pass is made for old or reference log-probabilities; all responses in one batch.
"""

import tiny_model
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Case, HeldLoop, serve

SEEDS = 1000  # rounds that a trainer has prompts for


def load(folder: str):
    """(model, tokenizer)."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(f"{folder}/tokenizer")


def prepare(case: Case, folder: str):
    """The function (seed, texts) -> response tokens."""
    return prepare_generate(case, folder) if case.kind == "sample" else Learner(case, folder)


def prepare_generate(case: Case, folder: str):
    """Texts to texts; `num_return_sequences` repeats the prompts."""
    model, tokenizer = load(folder)
    model.eval()

    def generate(given) -> int:
        seed, texts = given
        torch.manual_seed(seed)
        inputs = tokenizer(texts, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            output = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.new_tokens,
                num_return_sequences=case.samples,
            )  # fmt: skip
        responses = output[:, inputs.input_ids.shape[1] :]
        tokenizer.batch_decode(responses, skip_special_tokens=True)
        return int((responses != tiny_model.PAD).sum())  # behind the stop token is padding, which is never sampled

    return generate


class Learner(HeldLoop, TrainerCallback):
    """TRL's trainer, held before every step until the round begins."""

    def __init__(self, case: Case, folder: str):
        model, tokenizer = load(folder)
        texts = [text for seed in range(SEEDS) for text in tiny_model.prompts(case, seed)]
        settings = GRPOConfig(
            output_dir=f"{folder}/trl", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_steps=1_000_000, disable_tqdm=True, max_steps=SEEDS, shuffle_dataset=False,
            per_device_train_batch_size=case.responses, gradient_accumulation_steps=1, num_generations=case.samples,
            max_completion_length=case.new_tokens, temperature=1.0, top_p=1.0, top_k=0, num_iterations=1, beta=0.0, epsilon=0.2,
            learning_rate=1e-6, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant",
        )  # fmt: skip
        self.trainer = GRPOTrainer(
            model, reward_funcs=self.rewards, args=settings, processing_class=tokenizer, callbacks=[self],
            train_dataset=Dataset.from_dict({"prompt": texts}),
        )  # fmt: skip
        self.hold(self.trainer.train)

    def on_step_begin(self, args, state, control, **_):
        """Sampling belongs to the step: it begins only when the round does."""
        if self.given.get() is None:
            raise SystemExit  # ends this thread

    def on_step_end(self, args, state, control, **_):
        """The optimizer step is done."""
        self.done.put(None)

    def rewards(self, completions, completion_ids, **_) -> list[float]:
        """Also counts the tokens."""
        self.tokens = sum(len(ids) for ids in completion_ids)
        return [tiny_model.reward(text) for text in completions]


if __name__ == "__main__":
    serve(prepare, lambda case, seed: (seed + 1, tiny_model.prompts(case, seed)))
