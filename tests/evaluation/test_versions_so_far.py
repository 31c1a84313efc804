from dgmd_pipeline.evaluation import versions_so_far
from dgmd_pipeline.evaluation.versions_so_far import VersionSummary

VERSIONS = [
    VersionSummary(3, 1e9, 0.5, None, 2, None),
    VersionSummary(4, 2e9, None, 100, 3, None),
    VersionSummary(6, 3e9, 0.75, 200, 3, 5),
]


def test_a_figure_is_a_curve_over_the_versions_that_have_it():
    panels = {panel.title: panel for panel in versions_so_far.panels(VERSIONS)}
    assert {title: len(panel.curves[0].points) for title, panel in panels.items()} == {
        "Accuracy": 2, "Training images": 2, "Labels": 3,
    }  # fmt: skip
    assert [tick.text for tick in panels["Accuracy"].x_ticks] == ["3", "4", "5", "6"]
    assert [tick.text for tick in panels["Labels"].y_ticks] == ["2", "3"]


def test_there_is_no_curve_of_one_version():
    assert versions_so_far.panels(VERSIONS[:1]) == []
