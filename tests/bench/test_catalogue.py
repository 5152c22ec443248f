from detune.bench.catalogue import Catalogue
from detune.bench.recipes import RECIPES
from detune.bench.subsets import PUBLISHED
from detune.cli.tables import show_catalogue


def test_layers_and_rank_of_everything_and_where_it_is_from(capsys):
    show_catalogue(Catalogue.now())
    out = capsys.readouterr().out
    rows = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words}
    expected = {name: (subset.layers, subset.rank) for name, subset in PUBLISHED.items()} | {
        "vit-mini": (24, 16),
        "sd-mini": (264, 32),
        "mistral-mini-sft": (8, 64),
        "mistral-mini-dpo": (8, 64),
        "minilm": (12, 16),
    }
    assert expected.keys() == PUBLISHED.keys() | RECIPES.keys()
    for name, (layers, rank) in expected.items():
        assert rows[name][:2] == [str(layers), str(rank)]
    assert "hf download Eliahu/LoWRA-Bench" in out
    assert "detune bench build RECIPE --out DIR" in out
