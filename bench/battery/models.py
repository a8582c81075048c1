"""Small networks whose many copies ``torch.func.vmap`` trains at once: all is matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.battery.problem import IGNORED


class PatchConv(nn.Module):
    """A square convolution, as a linear map of patches."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.geometry = {"kernel_size": size, "stride": stride, "padding": padding}
        self.linear = nn.Linear(inputs * size * size, outputs)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H', W'] (square images)."""
        y = self.linear(F.unfold(x, **self.geometry).mT)  # [B, H' W', outputs]
        side = round(y.shape[-2] ** 0.5)
        return y.mT.unflatten(-1, (side, side))


class DigitsCNN(nn.Module):
    """The CNN of fastproj.testbed.digits, its convolutions as products over patches."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = PatchConv(1, channels, 3, stride=2, padding=1)  # 8 x 8 -> 4 x 4
        self.conv2 = PatchConv(channels, 2 * channels, 2, stride=2)  # 4 x 4 -> 2 x 2
        self.fc = nn.Linear(2 * channels * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1))


class CNN(nn.Module):
    """Two strided convolutions and a linear layer, for square images whose side 4 divides."""

    def __init__(self, side: int, classes: int, channels: int = 12, colours: int = 1) -> None:
        super().__init__()
        self.conv1 = PatchConv(colours, channels, 4, stride=4)
        self.conv2 = PatchConv(channels, 2 * channels, 3, stride=2, padding=1)
        end = (side // 4 + 1) // 2
        self.fc = nn.Linear(2 * channels * end * end, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, colours, side, side]."""
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1))


class MLP(nn.Module):
    """Linear layers with an activation between."""

    def __init__(self, *widths: int, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[B, widths[0]] -> [B, widths[-1]]."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Recurrent(nn.Module):
    """A gated recurrent unit (arXiv 1406.1078) over letters, and a class for its last state."""

    def __init__(self, letters: int, classes: int, width: int = 24) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.gates = nn.Linear(2 * width, 2 * width)
        self.new = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, classes] of letter numbers [B, T]."""
        letters = self.letters(ids)
        state = torch.zeros_like(letters[..., 0, :])
        for x in letters.unbind(-2):
            reset, update = self.gates(torch.cat([x, state], -1)).sigmoid().chunk(2, -1)
            new = self.new(torch.cat([x, reset * state], -1)).tanh()
            state = update * state + (1 - update) * new
        return self.head(state)


# ---- transformers -------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    """Attention of q [B, T, D] to k and v [B, S, D]; ``hidden`` is True where none is paid."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-3, -2) for t in (q, k, v))
    products = q @ k.mT / q.shape[-1] ** 0.5  # [B, heads, T, S]
    if hidden is not None:
        products = products.masked_fill(hidden, -1e9)
    return (products.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


class Block(nn.Module):
    """A transformer block: attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """[B, tokens, width]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1)).movedim(-2, 0)
        x = x + self.out(attend(q, k, v, self.heads, hidden))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer for 28 x 28 images: 16 patches, two blocks, their mean."""

    def __init__(self, width: int = 24, heads: int = 2, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = PatchConv(1, width, 7, stride=7)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 1, 28, 28]."""
        tokens = self.embed(x).flatten(-2).mT + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(-2))


class Words(nn.Module):
    """Embeddings of words and of their places."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        nn.init.normal_(self.words.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, width]."""
        return self.words(ids) + self.place[: ids.shape[-1]]


class Tagger(nn.Module):
    """A transformer block over the words of a text, and a class for each of them."""

    def __init__(self, vocabulary: int, length: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.embed = Words(vocabulary, width, length)
        self.block = Block(width, 2, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T, width] of word numbers [B, T]."""
        return self.norm(self.block(self.embed(input_ids), hidden_words(attention_mask)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, T, classes]."""
        return self.head(self.read(input_ids, attention_mask))


class TextClassifier(Tagger):
    """A class for the mean of a text's words."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes]."""
        weights = attention_mask / attention_mask.sum(-1, keepdim=True)
        return self.head((self.read(input_ids, attention_mask) * weights.unsqueeze(-1)).sum(-2))


class CausalLM(nn.Module):
    """A transformer block that reads the words before each place, and names the next."""

    def __init__(self, vocabulary: int, length: int, width: int = 24) -> None:
        super().__init__()
        self.embed = Words(vocabulary, width, length)
        self.block = Block(width, 2, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary]; padding stands at the end, where no word looks."""
        x = self.block(self.embed(input_ids), hidden_future(input_ids))
        return self.head(self.norm(x))


class Seq2Seq(nn.Module):
    """A block that reads the source, and one that writes the target with a look at the source."""

    def __init__(self, vocabulary: int, length: int, width: int = 24) -> None:
        super().__init__()
        self.embed = Words(vocabulary, width, length)
        self.reader = Block(width, 2, 2 * width)
        self.norm_read = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.source = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.writer = Block(width, 2, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Logits [B, T, vocabulary] of the target's words."""
        read = self.reader(self.embed(input_ids), hidden_words(attention_mask))
        k, v = self.source(self.norm_read(read)).chunk(2, -1)
        x = self.embed(decoder_input_ids)
        x = x + self.out(attend(self.query(x), k, v, 2, hidden_words(attention_mask)))
        return self.head(self.norm(self.writer(x, hidden_future(decoder_input_ids))))

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels one place later, padding as word 0, after word 0."""
        words = labels.masked_fill(labels == IGNORED, 0)
        return F.pad(words[..., :-1], (1, 0))


def hidden_words(attention_mask: Tensor) -> Tensor:
    """[B, T] of 1 and 0 -> [B, 1, 1, T], True for padding."""
    return (attention_mask == 0).unsqueeze(-2).unsqueeze(-2)


def hidden_future(ids: Tensor) -> Tensor:
    """[T, T], True for the places after each place."""
    length = ids.shape[-1]
    return torch.ones(length, length, dtype=torch.bool).triu(1)


# ---- images and texts ---------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """Embeddings of length 1 for images and for texts, and a learned scale."""

    def __init__(self, vocabulary: int, length: int, side: int, width: int = 16) -> None:
        super().__init__()
        self.image = CNN(side, width, channels=8, colours=3)
        self.words = nn.Embedding(vocabulary, 8)
        self.text = MLP(8 * length, 32, width)
        self.log_scale = nn.Parameter(
            torch.tensor([2.0])
        )  # of dimension 1: gradients are clipped by rows

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, side, side] and word numbers [B, T] -> [B, width] each, scale."""
        u, v = self.image(image), self.text(self.words(text).flatten(-2))
        return F.normalize(u, dim=-1), F.normalize(v, dim=-1), self.log_scale.exp()


class Sides(nn.Module):
    """Embeddings of length 1 for left and right sides of patches, and a learned scale."""

    def __init__(self, pixels: int, hidden: int = 24, width: int = 12) -> None:
        super().__init__()
        self.left = MLP(pixels, hidden, width)
        self.right = MLP(pixels, hidden, width)
        self.log_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right pixels [B, pixels] -> [B, width] each, scale. Names are open_clip's."""
        u, v = self.left(image), self.right(text)
        return F.normalize(u, dim=-1), F.normalize(v, dim=-1), self.log_scale.exp()
