"""Log-probabilities of given tokens, a chunk of the vocabulary logits at a time, and of no other tokens.

At Qwen's vocabulary of 151,936 the f32 logits of one 32K row are 18.6 GiB. They are never held: a loop walks the slots in
chunks, each chunk's logits live only inside it, and the backward pass computes them again.

Prompts are about half of all tokens and nobody asks for their log-probabilities. So each device puts the slots that are
asked for in front of its others, and the loop ends where they end: its length is data, its shapes are not.

The backward pass is written out, because the derived one would add up the output matrix's gradient, a term per chunk,
in the compute dtype: in bfloat16 that is worse the more chunks there are. Here every device adds up its own in f32, and
the devices' are added once, behind the loop.
"""

import functools

import jax
import jax.numpy as jnp

from dgpo_jax.sharding import constrain

# Logical axes of [R, C, S, ...]: R devices that split the rows, C that split the tokens of a row, S slots of each device.
AXES = ("batch", "tokens", None)


@jax.named_scope("logprobs")
def token_logprobs(
    hidden, unembedding, tokens, mask=None, *, temperature: float, chunk: int, entropy_gradient: bool = False, mesh=None
):
    """Log-probability and entropy of the token in each slot, given the slots before it.

    Args:
        hidden: dtype[N, T, D], the model's output; slot t predicts the token in slot t + 1.
        unembedding: dtype[D, V].
        tokens: i32[N, T].
        mask: bool[N, T], False where nobody asks; None = all slots are asked for.
        temperature: divides the logits, as in the sampler.
        chunk: slots of a device whose logits [chunk, V] exist at once.
        entropy_gradient: the entropy has a gradient, for a bonus on it; otherwise it is only watched, and costs the
            backward pass nothing.
        mesh: the rows are split over its `data` and `fsdp`, their tokens over `context`; None = one device.
    Returns:
        (logprobs f32[N, T], entropy f32[N, T] in nats), meant for slots that are asked for; the others hold 0, or values
        that mean nothing. Slot 0 of a row has nothing before it, nor has the first slot of a segment.
    """
    to_parts, to_rows = _partition(tokens.shape, mesh)
    asked = to_parts(jnp.ones(tokens.shape, bool) if mask is None else mask)
    order = jnp.argsort(~asked, axis=-1, stable=True)
    inverse = jnp.argsort(order, axis=-1)
    slots = order.shape[-1]
    chunk = min(chunk, slots)

    def in_order(x):  # those asked for first; as many slots as make whole chunks
        x = permute(to_parts(x), order, inverse)
        return jnp.pad(x, [(0, 0), (0, 0), (0, -slots % chunk)] + [(0, 0)] * (x.ndim - 3))

    predicting = jnp.pad(hidden[:, :-1], [(0, 0), (1, 0), (0, 0)])  # slot t now holds what predicts it
    last = jnp.max(jnp.sum(asked, axis=-1))
    outputs = chunk_logprobs(
        in_order(predicting), unembedding, in_order(tokens), last, temperature, chunk, entropy_gradient, mesh
    )
    logprobs, entropy = (to_rows(permute(x[..., :slots], inverse, order)) for x in outputs)
    return logprobs, entropy


def _partition(shape, mesh):
    """Two functions: [N, T, ...] -> [R, C, S, ...], all slots of a device in one axis, and back.

    Nothing moves from one device to another.
    """
    rows, slots = shape
    sizes = dict(mesh.shape) if mesh is not None else {}
    replicas, pieces = sizes.get("data", 1) * sizes.get("fsdp", 1), sizes.get("context", 1)

    def to_parts(x):
        x = x.reshape(replicas, rows // replicas, pieces, slots // pieces, *x.shape[2:]).swapaxes(1, 2)
        return _pin(x.reshape(replicas, pieces, -1, *x.shape[4:]), mesh)

    def to_rows(x):
        x = x.reshape(replicas, pieces, rows // replicas, slots // pieces).swapaxes(1, 2)
        return constrain(x.reshape(rows, slots), mesh, AXES[:2])

    return to_parts, to_rows


def _pin(x, mesh):
    return constrain(x, mesh, AXES + (None,) * (x.ndim - 3), name="slots of a device")


@jax.custom_vjp
def permute(x, order, inverse):
    """The slots of [R, C, S, ...] in the order i32[R, C, S].

    The derived backward pass would be a scatter; with `inverse`, which undoes `order`, it gathers like this one.
    """
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 3)), axis=2)


permute.defvjp(
    lambda x, order, inverse: (permute(x, order, inverse), (order, inverse)),
    lambda kept, pull: (permute(pull, kept[1], kept[0]), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def chunk_logprobs(predicting, unembedding, targets, asked, temperature, chunk, entropy_gradient, mesh):
    """Log-probability of each target and entropy of what predicts it.

    Args:
        predicting: dtype[R, C, S, D].
        unembedding: dtype[D, V].
        targets: i32[R, C, S].
        asked: i32[], how many of the first slots are asked for; the loop ends with their last chunk.
        entropy_gradient: False = the entropy's gradient is 0.
    Returns:
        (logprobs f32[R, C, S], entropy f32[R, C, S]), 0 behind that chunk.
    """
    return _forward(predicting, unembedding, targets, asked, temperature, chunk, entropy_gradient, mesh)[0]


def _forward(predicting, unembedding, targets, asked, temperature, chunk, entropy_gradient, mesh):
    def one_chunk(predicting, targets):
        logits = _logits(predicting, unembedding, temperature)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logprobs = logits - normaliser[..., None]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return chosen - normaliser, entropy, normaliser

    def body(first, outputs):
        return _write(outputs, one_chunk(*_read((predicting, targets), first, chunk)), first)

    zeros = _pin(jnp.zeros(targets.shape, jnp.float32), mesh)
    logprobs, entropy, normaliser = _walk(body, [zeros, zeros, zeros], asked, chunk)
    kept_entropy = entropy if entropy_gradient else None
    return (logprobs, entropy), (predicting, unembedding, targets, asked, normaliser, kept_entropy)


def _backward(temperature, chunk, entropy_gradient, mesh, kept, pulls):
    predicting, unembedding, targets, asked, normaliser, entropy = kept
    pull, entropy_pull = pulls if entropy_gradient else (pulls[0], None)
    inputs = (predicting, targets, normaliser, entropy, pull, entropy_pull)  # None where there is no gradient

    def one_chunk(predicting, targets, normaliser, entropy, pull, entropy_pull):
        logprobs = _logits(predicting, unembedding, temperature) - normaliser[..., None]
        probabilities = jnp.exp(logprobs)
        one_hot = jax.nn.one_hot(targets, unembedding.shape[1], dtype=jnp.float32)
        pull = (one_hot - probabilities) * (pull / temperature)[..., None]
        if entropy_gradient:  # by logit v the entropy H changes by -p_v (log p_v + H)
            pull -= probabilities * (logprobs + entropy[..., None]) * (entropy_pull / temperature)[..., None]
        # In the compute dtype like every other product of the backward pass; only sums over chunks stay f32.
        return pull.astype(predicting.dtype)

    def body(first, carry):
        to_predicting, total = carry
        read = _read(inputs, first, chunk)
        pull = one_chunk(*read)
        total += jnp.einsum("rcsd,rcsv->rcdv", read[0], pull, preferred_element_type=jnp.float32)
        (to_predicting,) = _write((to_predicting,), (jnp.einsum("rcsv,dv->rcsd", pull, unembedding),), first)
        return to_predicting, total

    to_predicting = _pin(jnp.zeros_like(predicting), mesh)
    # A device each, so that nothing is exchanged until all chunks are done.
    total = jnp.zeros((*targets.shape[:2], *unembedding.shape), jnp.float32)
    total = constrain(total, mesh, ("batch", "tokens", None, "vocab"))
    to_predicting, total = _walk(body, (to_predicting, total), asked, chunk)
    return to_predicting, jnp.sum(total, axis=(0, 1)).astype(unembedding.dtype), None, None


def _walk(body, carry, asked, chunk):
    """body(first slot of a chunk, carry) -> carry, for every chunk that holds a slot that is asked for."""
    return jax.lax.fori_loop(0, -(-asked // chunk), lambda index, carry: body(index * chunk, carry), carry)


def _read(arrays, first, chunk):
    return [x if x is None else jax.lax.dynamic_slice_in_dim(x, first, chunk, axis=2) for x in arrays]


def _write(arrays, parts, first):
    return [jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=2) for x, part in zip(arrays, parts, strict=True)]


def _logits(predicting, unembedding, temperature):
    """dtype[R, C, chunk, D], dtype[D, V] -> f32[R, C, chunk, V]."""
    return jnp.einsum("rcsd,dv->rcsv", predicting, unembedding, preferred_element_type=jnp.float32) / temperature


chunk_logprobs.defvjp(_forward, _backward)
