"""The documents in examples/documents: of the right size, in related clusters, with tables that add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spell_megatron.corpus.options import Options
from spell_megatron.corpus.prepare import prepare
from spell_megatron.selfplay.documents import load_clusters

FOLDER = Path(__file__).parents[1] / "examples" / "documents"
DOCUMENTS = sorted(FOLDER.glob("*/*"))


def tables(text: str) -> list[list[list[str]]]:
    """Tables of a markdown text as rows of cells, heading first, without the line of dashes."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")]
        for block in blocks
    ]
    for table in rows:
        assert all(re.fullmatch(r"-+:?", cell) for cell in table[1]), table[1]
    return [[table[0], *table[2:]] for table in rows]


def number(cell: str) -> float | None:
    """1,234.5 and, for a negative number, (1,234.5)."""
    match = re.fullmatch(r"(\()?(\d{1,3}(?:,\d{3})*|\d+)(\.\d+)?(\))?", cell)
    if not match:
        return None
    value = float((match[2] + (match[3] or "")).replace(",", ""))
    return -value if match[1] else value


def columns(table: list[list[str]]) -> list[dict[str, float]]:
    """Numeric columns of a table as {row name: value}."""
    return [
        {row[0]: value for row in table[1:] if (value := number(row[i])) is not None} for i in range(1, len(table[0]))
    ]


def test_there_are_enough_clusters_of_enough_documents():
    sizes = [len(list(folder.iterdir())) for folder in FOLDER.iterdir() if folder.is_dir()]
    assert len(sizes) >= 14
    assert all(4 <= size <= 7 for size in sizes), sizes


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_document(path):
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".md" and text.startswith("# ") and text.endswith("\n") and not text.endswith("\n\n")
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert 150 <= len(words) <= 500
    for table in tables(text):
        assert len(table) >= 3
        assert all(len(row) == len(table[0]) for row in table), table


def test_totals_are_the_sums_of_what_stands_above():
    """In every column with a row `Total...`: it equals the rows since the last total or result."""
    checked = 0
    for path in DOCUMENTS:
        for table in tables(path.read_text(encoding="utf-8")):
            for column in columns(table):
                above = 0.0
                for name, value in column.items():
                    if re.match(r"Total|All |Gross loans", name) and above:
                        assert value == pytest.approx(above, abs=1e-6), f"{path}: {name}"
                        checked += 1
                    if re.match(r"Total|All |Gross loans|Net |Profit before", name):
                        above = 0.0
                    else:
                        above += value
    assert checked >= 60  # 67 when this was written


# Rows that follow from others: {file: [(result, [rows added], [rows subtracted]), ...]}
PROFIT = [
    ("Gross profit", ["Net sales"], ["Cost of goods sold"]),
    ("Operating profit", ["Gross profit"], ["Selling and distribution", "Administration", "Restructuring"]),
    ("Profit before tax", ["Operating profit"], ["Interest expense"]),
    ("Net profit", ["Profit before tax"], ["Income tax"]),
]
SOFTWARE = [
    ("Gross profit", ["Total revenue"], ["Cost of subscription", "Cost of services"]),
    (
        "Operating loss",
        ["Gross profit"],
        ["Research and development", "Sales and marketing", "General and administrative"],
    ),
    (
        "At end of quarter",
        ["At start of quarter", "New customers", "Expansion", "Lost customers", "Contraction"],
        [],
    ),
]
DERIVED = {
    "northlake-foods/annual-report-2023.md": PROFIT,
    "northlake-foods/annual-report-2024.md": PROFIT,
    "northlake-foods/note-5-segments.md": [
        ("Operating profit", ["Frozen meals", "Dairy", "Bakery", "Unallocated corporate costs"], [])
    ],
    "northlake-foods/notes-9-and-12-inventory-and-debt.md": [
        ("Inventories, net", ["Total before allowance", "Allowance for obsolete stock"], []),
        ("Net debt", ["Total borrowings", "Cash"], []),
    ],
    "halden-marine/quarterly-results-2024.md": [
        (
            "Operating result",
            ["Freight and charter revenue"],
            ["Voyage expenses", "Ship operating expenses", "Depreciation", "Administration"],
        )
    ],
    "halden-marine/note-loans-2024.md": [
        ("Balance on 31 December 2024", ["Balance on 1 January 2024", "Drawn", "Repaid"], [])
    ],
    "brightwater-utilities/income-statement-2024.md": [
        ("Profit before depreciation", ["Total revenue"], ["Total operating costs"]),
        ("Operating profit", ["Profit before depreciation"], ["Depreciation"]),
    ],
    "kestrel-software/first-quarter-2025.md": SOFTWARE,
    "kestrel-software/second-quarter-2025.md": SOFTWARE,
    "kestrel-software/deferred-revenue-and-cash.md": [
        (
            "Deferred revenue at end",
            ["Deferred revenue at start", "Billed in the quarter", "Recognised as revenue"],
            [],
        ),
        (
            "Cash at end",
            ["Cash at start", "Operating cash flow", "Purchases of equipment", "Share purchases"],
            [],
        ),
    ],
    "lindqvist-glass/segments-2024.md": [
        ("Operating result", ["Containers", "Tableware", "Technical glass", "Group costs"], [])
    ],
    "meridian-bank/income-statement-2024.md": [
        ("Net interest income", ["Total interest income"], ["Total interest expense"]),
        (
            "Income before tax",
            ["Net interest income", "Non-interest income"],
            ["Provision for credit losses", "Non-interest expense"],
        ),
        ("Net income", ["Income before tax"], ["Income tax"]),
    ],
    "meridian-bank/note-4-loans.md": [("Net loans", ["Gross loans", "Allowance for credit losses"], [])],
    "meridian-bank/note-5-allowance.md": [
        (
            "Allowance on 31 December",
            ["Allowance on 1 January", "Provision charged to income", "Loans charged off", "Recoveries"],
            [],
        )
    ],
    "tamarack-cooperative/surplus-2024.md": [
        (
            "Surplus",
            ["Revenue"],
            ["Paid to members for logs", "Sawmill operating costs", "Transport", "Depreciation"],
        )
    ],
}


@pytest.mark.parametrize("name", DERIVED)
def test_results_follow_from_their_parts(name):
    found = [column for table in tables((FOLDER / name).read_text(encoding="utf-8")) for column in columns(table)]
    for result, added, subtracted in DERIVED[name]:
        matching = [column for column in found if {result, *added, *subtracted} <= column.keys()]
        assert matching, result
        for column in matching:
            expected = sum(column[row] for row in added) - sum(column[row] for row in subtracted)
            assert column[result] == pytest.approx(expected, abs=1e-6), result


def test_numbers_agree_between_documents():
    def cell(name: str, row: str, heading: str) -> float:
        values = [
            number(line[table[0].index(heading)])
            for table in tables((FOLDER / name).read_text(encoding="utf-8"))
            for line in table[1:]
            if line[0] == row and heading in table[0]
        ]
        assert len(values) == 1, (name, row, heading)
        return values[0]

    log = "tamarack-cooperative/deliveries-and-prices-2024.md"
    paid = sum(
        cell(log, species, "Volume 2024, thousand m3") * cell(log, species, "Price 2024, $ per m3")
        for species in ("Spruce", "Pine", "Birch")
    )
    assert paid == cell("tamarack-cooperative/surplus-2024.md", "Paid to members for logs", "2024")
    for year in ("2023", "2024"):
        assert cell("northlake-foods/annual-report-2024.md", "Net sales", year) == cell(
            "northlake-foods/note-5-segments.md", "Total net sales", year
        )
        assert cell("lindqvist-glass/segments-2024.md", "Total net sales", year) == cell(
            "lindqvist-glass/note-regions-and-currency.md", "Total net sales", year
        )
    for year, day in (("2023", "1 January"), ("2024", "31 December")):
        assert -cell("meridian-bank/note-4-loans.md", "Allowance for credit losses", year) == cell(
            "meridian-bank/note-5-allowance.md", f"Allowance on {day}", "2024"
        )
    water = "brightwater-utilities/supply-and-leakage-2024.md"
    tariff = "brightwater-utilities/tariff-decision-2024.md"
    revenue = "brightwater-utilities/income-statement-2024.md"
    household = cell(water, "Households", "Billed volume, million cubic metres")
    assert household * cell(tariff, "Household water", "Until 30 June 2024") == pytest.approx(
        cell(revenue, "Household water", "2024")
    )
    assert cell(
        "kestrel-software/customers-and-staff.md",
        "All customers",
        "Annual recurring revenue, thousand dollars",
    ) == cell("kestrel-software/second-quarter-2025.md", "At end of quarter", "Q2 2025")


def test_prepare_makes_one_cluster_per_folder(tmp_path):
    summary = prepare([FOLDER], tmp_path / "out.parquet")
    clusters = load_clusters(tmp_path / "out.parquet")
    assert [cluster.id for cluster in clusters] == sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    assert sum(len(cluster.documents) for cluster in clusters) == summary.counts.documents == len(DOCUMENTS)
    assert not summary.counts.skipped


def test_similarity_finds_the_folders_again(tmp_path):
    """The same documents without their folders: 90 % of them are grouped with their own kind."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in DOCUMENTS:
        (flat / f"{path.parent.name}~{path.name}").write_bytes(path.read_bytes())
    prepare([flat], tmp_path / "out.parquet", Options(documents_per_cluster=5))
    at_home = 0
    for cluster in load_clusters(tmp_path / "out.parquet"):
        folders = [name.split("~")[0] for name in cluster.document_ids]
        at_home += max(folders.count(folder) for folder in folders)
    assert at_home >= 0.9 * len(DOCUMENTS), at_home
