"""Log-probabilities of given tokens, a chunk of the vocabulary logits at a time.

At Qwen's vocabulary of 151,936 the f32 logits of one 32K row are 18.6 GiB. They are never held: a scan walks the row in
chunks, each chunk's logits live only inside it, and the backward pass computes them again.

The backward pass is written out, because the derived one would add up the output matrix's gradient, a term per chunk,
in the compute dtype: in bfloat16 that is worse the more chunks there are. Here it is added up in f32 and rounded once.
"""

import functools

import jax
import jax.numpy as jnp


def token_logprobs(hidden, unembedding, tokens, *, temperature: float, chunk: int, entropy_gradient: bool = False):
    """Log-probability and entropy of the token in each slot, given the slots before it.

    Args:
        hidden: dtype[N, T, D], the model's output; slot t predicts the token in slot t + 1.
        unembedding: dtype[D, V].
        tokens: i32[N, T].
        temperature: divides the logits, as in the sampler.
        chunk: slots whose logits [N, chunk, V] exist at once.
        entropy_gradient: the entropy has a gradient, for a bonus on it; otherwise it is only watched, and costs the
            backward pass nothing.
    Returns:
        (logprobs f32[N, T], entropy f32[N, T] in nats). Slot 0 of a row has nothing before it: its values mean nothing,
        and neither do those of the first slot of a segment; `loss_mask` is False there.
    """
    rows, slots = hidden.shape[:2]
    chunk = min(chunk, slots)
    chunks = -(-slots // chunk)

    def in_chunks(x):  # [N, T, ...] -> [chunks, N, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - slots)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, chunk, *x.shape[2:]), 1, 0)

    predicting = jnp.pad(hidden[:, :-1], [(0, 0), (1, 0), (0, 0)])  # slot t now holds what predicts it
    outputs = chunk_logprobs(in_chunks(predicting), unembedding, in_chunks(tokens), temperature, entropy_gradient)
    logprobs, entropy = (jnp.moveaxis(x, 0, 1).reshape(rows, chunks * chunk)[:, :slots] for x in outputs)
    return logprobs, entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunk_logprobs(predicting, unembedding, targets, temperature, entropy_gradient):
    """Log-probability of each target and entropy of what predicts it.

    Args:
        predicting: dtype[C, N, chunk, D], C chunks that are walked one after the other.
        unembedding: dtype[D, V].
        targets: i32[C, N, chunk].
        entropy_gradient: False = the entropy's gradient is 0.
    Returns:
        (logprobs f32[C, N, chunk], entropy f32[C, N, chunk]).
    """
    return _forward(predicting, unembedding, targets, temperature, entropy_gradient)[0]


def _forward(predicting, unembedding, targets, temperature, entropy_gradient):
    def one_chunk(_, inputs):
        predicting, targets = inputs
        logits = _logits(predicting, unembedding, temperature)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logprobs = logits - normaliser[..., None]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return None, (chosen - normaliser, entropy, normaliser)

    _, (logprobs, entropy, normaliser) = jax.lax.scan(one_chunk, None, (predicting, targets))
    kept_entropy = entropy if entropy_gradient else None
    return (logprobs, entropy), (predicting, unembedding, targets, normaliser, kept_entropy)


def _backward(temperature, entropy_gradient, kept, pulls):
    predicting, unembedding, targets, normaliser, entropy = kept
    pull, entropy_pull = pulls if entropy_gradient else (pulls[0], None)

    def one_chunk(total, inputs):
        predicting, targets, normaliser, entropy, pull, entropy_pull = inputs
        logprobs = _logits(predicting, unembedding, temperature) - normaliser[..., None]
        probabilities = jnp.exp(logprobs)
        one_hot = jax.nn.one_hot(targets, unembedding.shape[1], dtype=jnp.float32)
        pull = (one_hot - probabilities) * (pull / temperature)[..., None]
        if entropy_gradient:  # by logit v the entropy H changes by -p_v (log p_v + H)
            pull -= probabilities * (logprobs + entropy[..., None]) * (entropy_pull / temperature)[..., None]
        # In the compute dtype like every other product of the backward pass; only sums over chunks stay f32.
        pull = pull.astype(predicting.dtype)
        total += jnp.einsum("ntd,ntv->dv", predicting, pull, preferred_element_type=jnp.float32)
        return total, jnp.einsum("ntv,dv->ntd", pull, unembedding)

    total = jnp.zeros(unembedding.shape, jnp.float32)
    inputs = (predicting, targets, normaliser, entropy, pull, entropy_pull)  # None where there is no gradient
    total, to_predicting = jax.lax.scan(one_chunk, total, inputs)
    return to_predicting, total.astype(unembedding.dtype), None


chunk_logprobs.defvjp(_forward, _backward)


def _logits(predicting, unembedding, temperature):
    """dtype[N, chunk, D], dtype[D, V] -> f32[N, chunk, V]."""
    return jnp.einsum("ntd,dv->ntv", predicting, unembedding, preferred_element_type=jnp.float32) / temperature
