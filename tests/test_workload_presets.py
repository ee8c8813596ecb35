"""Presets, and that they are what their comments say."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from viisim.errors import InputError
from viisim.workload.lengths import QuantileTable
from viisim.workload.presets import load_preset, preset_names
from viisim.workload.trace_file import TraceColumns, read_trace


@pytest.fixture(scope="module")
def conversation(shared: Path) -> TraceColumns:
    folder = shared / "data/traces/azure_llm_2023"
    return read_trace(folder / "AzureLLMInferenceTrace_conv.csv.gz")


def test_every_preset_loads_and_names_its_source_and_licence():
    for name in preset_names():
        preset = load_preset(name)
        assert preset.source
        assert preset.licence


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(InputError, match=r"there is no 'azure_cov'; did you mean 'azure_conv'\?"):
        load_preset("azure_cov")


def test_an_unknown_preset_like_none_lists_those_there_are():
    with pytest.raises(InputError, match=r"there is no 'x'; there are: azure_conv"):
        load_preset("x")


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
def test_azure_conv_has_the_quantiles_of_the_trace(conversation: TraceColumns, column: str):
    table: QuantileTable = getattr(load_preset("azure_conv"), column)
    tokens = getattr(conversation, column)
    assert table.quantiles == {
        percent: round(np.quantile(tokens, percent / 100)) for percent in table.quantiles
    }


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
def test_azure_conv_has_the_means_of_the_trace(conversation: TraceColumns, column: str):
    table: QuantileTable = getattr(load_preset("azure_conv"), column)
    assert table.mean_tokens == pytest.approx(getattr(conversation, column).mean(), rel=0.01)


def test_azure_conv_has_the_rank_correlation_of_the_trace(conversation: TraceColumns):
    measured = spearmanr(conversation.prompt_tokens, conversation.output_tokens).statistic
    assert load_preset("azure_conv").rank_correlation == round(measured, 4)


def test_azure_conv_has_the_rate_and_burstiness_of_the_trace(conversation: TraceColumns):
    preset = load_preset("azure_conv")
    gaps_s = np.diff(conversation.arrived_ns) / 1e9
    assert preset.rate_per_s == round(len(conversation) / gaps_s.sum(), 5)
    assert preset.interarrival_cv == round(gaps_s.std() / gaps_s.mean(), 3)
