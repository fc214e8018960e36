"""Models and machines of any size, as they are known when a model is cut."""

from hypothesis import strategies as st

from lockstep.model.costs import ModelCosts
from lockstep.model.partition import RankResources

PLENTY = 10**15
MB = 1_000_000


def model(layer_bytes, head=0, embedding=0, tied=False, kv=0, window=None, largest=0):
    count = len(layer_bytes)
    return ModelCosts(
        layer_bytes=tuple(layer_bytes),
        read_bytes=tuple(layer_bytes),
        embedding_bytes=embedding,
        head_bytes=head,
        tied=tied,
        kv_bytes_per_token=(kv,) * count,
        kv_window=(window,) * count,
        largest_tensor_bytes=largest,
        max_context=131072,
        vocab_size=1000,
    )


def machines(*memory_bytes):
    return [RankResources(m, f"mac{rank}") for rank, m in enumerate(memory_bytes)]


models = st.builds(
    model,
    st.lists(st.integers(0, 50), min_size=1, max_size=9),
    head=st.integers(0, 120),
    embedding=st.integers(0, 120),
    tied=st.booleans(),
    kv=st.integers(0, 5),
)
