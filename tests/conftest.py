"""What all tests share: the repo on the path, no network, two threads, a tokenizer, and a tiny checkpoint."""

import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's job in the background ignores it, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from model import GPT, Checkpoint, GPTConfig  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

torch.set_num_threads(2)

TEXTS = [
    "你好，请问今天天气怎么样？今天天气很好，太阳出来了，我们去公园散步吧。",
    "春天来了，花开了，鸟儿在树上唱歌。夏天很热，秋天凉快，冬天会下雪。",
    "Hello! How are you today? The weather is fine and the sun is shining over the hills.",
    "Spring is here, the flowers are open and the birds are singing in the trees.",
    "user system assistant 1 2 3 4 5 6 7 8 9 10",
]
CORPUS = [
    "春天来了，花开了，鸟儿在树上唱歌。夏天很热，秋天凉快，冬天会下雪。\n今天是星期一，明天是星期二。",
    "Hello there! It's a fine day, isn't it? We'll walk over the hills, 12 or 345 miles.\n\n  And back.\r\n",
    "def f(x):\n    return x + 1  # naïve café 😀👨‍👩‍👧 ñ ü ß Ж я\n\t\tif x: pass",
    "aaaa bbbb abab    \n\n\n ...!!! -- ==== user assistant system tool\n",
] * 3


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 600)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of an untrained GPT with lively logits and a tokenizer of its own. It never ends a reply."""
    tokenizer = Tokenizer.train(TEXTS * 4, 400)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=2048, n_layer=2, n_head=4, n_kv_head=2,
                       d_model=64, d_ff=128, head_dim=16, tie_embeddings=False)
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
        model.lm_head.weight[list(tokenizer.special_ids.values())] = 0.0  # never among the likeliest
    path = tmp_path_factory.mktemp("tiny") / "best_model.pt"
    Checkpoint(config, model.state_dict(), tokenizer.to_dict(), {"summary": {"chat": True}}).save(path)
    return path
