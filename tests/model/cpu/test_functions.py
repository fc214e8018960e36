import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, llama

from lockstep.model.cpu.attention import Attention
from lockstep.model.cpu.functions import cpu_functions, swiglu


def near(ours, theirs):
    return mx.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_swiglu_is_that_of_mlx_lm_far_from_zero_too():
    gate = mx.concatenate([mx.random.normal((64,)), mx.array([-500.0, -90.0, -20.0, 0.0, 20.0, 90.0, 500.0])])
    x = mx.random.normal(gate.shape)
    assert near(swiglu(gate, x), activations.swiglu(gate, x))


def test_a_model_computes_the_same_with_the_functions_and_others_are_untouched():
    arguments = llama.ModelArgs("llama", 16, 2, 32, 4, 1e-5, 50, num_key_value_heads=2)
    mx.random.seed(3)
    model, other, tokens = llama.Model(arguments), llama.Model(arguments), mx.array([[3, 1, 4, 1, 5]])
    wanted = model(tokens)
    mx.eval(wanted)
    cpu_functions(model)
    attentions = [type(layer.self_attn) for layer in model.layers]
    assert attentions[0] is attentions[1] is not llama.Attention
    assert issubclass(attentions[0], llama.Attention)
    assert attentions[0].__call__.__globals__["scaled_dot_product_attention"].__class__ is Attention
    assert near(model(tokens), wanted)
    assert type(other.layers[0].self_attn) is llama.Attention
    assert llama.swiglu is activations.swiglu


def test_a_function_of_the_same_name_that_is_not_mlx_lms_stays():
    class Own(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            return swiglu(x, x)

    own = Own()
    cpu_functions(own)
    assert type(own) is Own
