"""Log-probabilities of given tokens, a chunk of the vocabulary logits at a time.

At Qwen's vocabulary of 151,936 the f32 logits of one 32K row are 18.6 GiB. They are never held: a scan walks the row in
chunks, each chunk's logits live only inside it, and the backward pass computes them again.
"""

import jax
import jax.numpy as jnp


def token_logprobs(hidden, unembedding, tokens, *, temperature: float, chunk: int):
    """Log-probability and entropy of the token in each slot, given the slots before it.

    Args:
        hidden: dtype[N, T, D], the model's output; slot t predicts the token in slot t + 1.
        unembedding: dtype[D, V].
        tokens: i32[N, T].
        temperature: divides the logits, as in the sampler.
        chunk: slots whose logits [N, chunk, V] exist at once.
    Returns:
        (logprobs f32[N, T], entropy f32[N, T], without gradient). Slot 0 of a row has nothing before it: its values
        mean nothing, and neither do those of the first slot of a segment; `loss_mask` is False there.
    """
    rows, slots = hidden.shape[:2]
    chunk = min(chunk, slots)
    chunks = -(-slots // chunk)

    def in_chunks(x):  # [N, T, ...] -> [chunks, N, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - slots)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(_, inputs):
        predicting, target = inputs
        logits = jnp.einsum("ntd,dv->ntv", predicting, unembedding, preferred_element_type=jnp.float32) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        frozen = jax.lax.stop_gradient(logits - normaliser[..., None])
        entropy = -jnp.sum(jnp.exp(frozen) * frozen, axis=-1)
        return None, (chosen - normaliser, entropy)

    predicting = jnp.pad(hidden[:, :-1], [(0, 0), (1, 0), (0, 0)])  # slot t now holds what predicts it
    _, outputs = jax.lax.scan(one_chunk, None, (in_chunks(predicting), in_chunks(tokens)))
    logprobs, entropy = (jnp.moveaxis(x, 0, 1).reshape(rows, chunks * chunk)[:, :slots] for x in outputs)
    return logprobs, entropy
