"""tunix's side of a comparison: its own sampler, and its own GRPO trainer with the vanilla rollout.

Runs under an interpreter with google-tunix 0.1.7; not run by hand: `against_tunix.py` starts it; see turns.py.

What was chosen for it, each the fastest it has: the cache no larger than needed unless the case says so; top_p=1.0, which it
samples without sorting (None would mean greedy); no log-probabilities from the sampler; no KL and one step per batch,
so that it makes no forward pass for old or reference log-probabilities; all responses in one batch.
"""

import jax
import numpy as np
import optax
import tiny_model
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from turns import Case, HeldLoop, serve


def load_model(folder: str):
    """(model, mesh of the one device, tokenizer)."""
    config = qwen2.ModelConfig(
        num_layers=tiny_model.LAYERS, vocab_size=tiny_model.VOCABULARY, embed_dim=tiny_model.WIDTH, hidden_dim=tiny_model.MLP,
        num_heads=tiny_model.HEADS, head_dim=tiny_model.HEAD, num_kv_heads=tiny_model.KEY_HEADS, rope_theta=10_000, norm_eps=1e-6,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = qwen2_params.create_model_from_safe_tensors(folder, config, mesh)
    return model, mesh, AutoTokenizer.from_pretrained(f"{folder}/tokenizer")


def prepare(case: Case, folder: str):
    """The function (seed, texts) -> response tokens."""
    return prepare_sampler(case, folder) if case.kind == "sample" else Learner(case, folder)


def prepare_sampler(case: Case, folder: str):
    """Prompts are repeated for their samples: it knows no groups."""
    model, _, tokenizer = load_model(folder)
    slots = case.cache or case.prompt_tokens + case.new_tokens
    sampler = Sampler(model, tokenizer, CacheConfig(slots, tiny_model.LAYERS, tiny_model.KEY_HEADS, tiny_model.HEAD))

    def sample(given) -> int:
        seed, texts = given
        output = sampler(
            np.repeat(np.array(texts), case.samples).tolist(), case.new_tokens, max_prompt_length=case.prompt_tokens,
            temperature=1.0, top_p=1.0, seed=seed,
        )  # fmt: skip
        # It cuts a response off before its stop token, which was sampled too.
        return sum(min(len(tokens) + 1, case.new_tokens) for tokens in output.tokens)

    return sample


class Learner(HeldLoop):
    """Its trainer, which asks for prompts: it is given those of a round when the round begins."""

    def __init__(self, case: Case, folder: str):
        self.case = case
        self.model, mesh, tokenizer = load_model(folder)
        self.rollout_config = RolloutConfig(
            max_tokens_to_generate=case.new_tokens, max_prompt_length=case.prompt_tokens, temperature=1.0, top_p=1.0,
            kv_cache_size=case.cache or case.prompt_tokens + case.new_tokens, seed=0,
        )  # fmt: skip
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.1))
        cluster = rl_cluster.RLCluster(
            actor=self.model, tokenizer=tokenizer,
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh={role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)},
                rollout_config=self.rollout_config,
                training_config=rl_cluster.RLTrainingConfig(
                    actor_optimizer=optimizer, eval_every_n_steps=1_000_000, max_steps=1_000_000
                ),
            ),
        )  # fmt: skip
        settings = GRPOConfig(num_generations=case.samples, num_iterations=1, beta=0.0, epsilon=0.2)
        learner = GRPOLearner(cluster, settings, reward_fns=self.rewards)
        self.hold(lambda: self.train(learner, mesh))

    def train(self, learner: GRPOLearner, mesh) -> None:
        """Until `close`."""
        with mesh:
            learner.train(self.batches())

    def batches(self):
        """A batch when a round begins; being asked for the next one means that it has ended."""
        while (given := self.given.get()) is not None:
            self.rollout_config.seed, texts = given
            yield {"prompts": np.array(texts)}
            jax.block_until_ready(nnx.state(self.model))
            self.done.put(None)

    def rewards(self, prompts, completions, **_) -> list[float]:
        """Also counts the tokens, the stop token that is cut off included."""
        self.tokens = sum(min(len(text.split()) + 1, self.case.new_tokens) for text in completions)
        return [tiny_model.reward(text) for text in completions]


if __name__ == "__main__":
    serve(prepare, lambda case, seed: (seed + 1, tiny_model.prompts(case, seed)))
