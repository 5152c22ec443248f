import itertools

import pytest

from detune.demo.texts import DEMO_DOMAINS, DOMAINS, passages
from detune.errors import InputError


def test_there_are_three_domains_to_show_and_eight_to_measure_on():
    assert len(DEMO_DOMAINS) == 3
    assert len(set(DOMAINS)) >= 8
    assert set(DEMO_DOMAINS) <= set(DOMAINS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_has_hundreds_of_distinct_one_line_passages(domain):
    found = passages(domain)
    assert len(found) >= 300
    assert len(set(found)) == len(found)
    assert all("\n" not in passage and len(passage.split()) >= 8 for passage in found)
    assert passages(domain) == found


def test_domains_hardly_share_a_passage():
    for one, other in itertools.combinations([set(passages(domain)) for domain in DOMAINS], 2):
        assert len(one & other) <= 0.02 * min(len(one), len(other))


def test_an_unknown_domain_is_told_the_known_ones():
    with pytest.raises(InputError, match=r"no text is called 'poems'; expected one of language, "):
        passages("poems")
