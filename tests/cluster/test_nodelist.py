import pytest

from job.cluster.scheduler import expand_nodelist


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("localhost", ["localhost"]),
        ("gpu-a100.cluster_2", ["gpu-a100.cluster_2"]),
        ("n1,n2", ["n1", "n2"]),
        ("n2,n10,n1", ["n2", "n10", "n1"]),
        ("login,n[1-2],login2", ["login", "n1", "n2", "login2"]),
        ("n[1-3,07-09]", ["n1", "n2", "n3", "n07", "n08", "n09"]),
        ("n[2-3,10]", ["n2", "n3", "n10"]),
        ("n[10,2]", ["n10", "n2"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[0-0]", ["n0"]),
        ("n[000]", ["n000"]),
        ("n[5]", ["n5"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("rack[01-02]-n[1,3].local", [f"rack0{r}-n{n}.local" for r in (1, 2) for n in (1, 3)]),
        ("[1-2]n", ["1n", "2n"]),
        ("a[1-2][3-4]", ["a13", "a14", "a23", "a24"]),
        ("a[1,3],b[2-3]", ["a1", "a3", "b2", "b3"]),
        # As sites name them: Perlmutter, Frontier, JUWELS, Snellius, AWS ParallelCluster, Azure.
        ("nid[001028-001029,001032]", ["nid001028", "nid001029", "nid001032"]),
        ("frontier[00001-00003]", ["frontier00001", "frontier00002", "frontier00003"]),
        ("jwb[0097,0100]", ["jwb0097", "jwb0100"]),
        ("r28n[1-2],r29n12", ["r28n1", "r28n2", "r29n12"]),
        ("gpu-dy-p4d-[1-2]", ["gpu-dy-p4d-1", "gpu-dy-p4d-2"]),
        ("cluster-hpc-pg0-[9-11]", [f"cluster-hpc-pg0-{n}" for n in (9, 10, 11)]),
        # Of submitit's tests.
        ("learnfair[0300-0302]", ["learnfair0300", "learnfair0301", "learnfair0302"]),
        (
            "compute-b24-[1-3,5-6],compute-a-1",
            [
                *(f"compute-b24-{n}" for n in (1, 2, 3, 5, 6)),
                "compute-a-1",
            ],
        ),
        ("hostname[90-92]suffix", [f"hostname{n}suffix" for n in (90, 91, 92)]),
    ],
)
def test_a_nodelist_is_expanded_in_its_order(text: str, nodes: list[str]) -> None:
    assert expand_nodelist(text) == nodes


def test_a_nodelist_may_be_as_long_as_slurm_allows() -> None:
    nodes = expand_nodelist("n[1-65536]")
    assert (len(nodes), nodes[0], nodes[-1]) == (65536, "n1", "n65536")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "n1,",
        ",n1",
        "n1,,n2",
        "n1 n2",
        "n1, n2",
        "n1\n",
        "n[",
        "n]",
        "n[]",
        "n[1",
        "n1]",
        "n[1-]",
        "n[-1]",
        "n[,1]",
        "n[1,]",
        "n[1-2-3]",
        "n[3-1]",
        "n[a-c]",
        "n[1-0x3]",
        "n[1 - 3]",
        "n[٣]",
        "n[[1-2]]",
        "n[1-[2-3]]",
        "n[1-2",
        "(null)[1",
        "n[0-999999999]",
        "n[1-300]m[1-300]",
        "n[1-40000],m[1-40000]",
        "n[" + "9" * 5000 + "]",
    ],
)
def test_what_is_no_nodelist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        expand_nodelist(text)
