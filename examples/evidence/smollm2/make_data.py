"""Make documents.jsonl and heldout.jsonl of the documents in examples/documents.

    python examples/evidence/smollm2/make_data.py

A document here is a paragraph of running text (tables, headings and short paragraphs are left out), a cluster two
neighbouring paragraphs of one file. The files of four folders are held out: they are in no training cluster, and the
questions below are about them. Each answer stands word for word in one of the question's two paragraphs.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "documents"
FEWEST_WORDS = 15

# Written by hand for this run, by reading; document -> (question, answer).
QUESTIONS = {
    "sorrel-bridge/history": [
        ("Who designed Sorrel Bridge?", "Beatrix Hollander"),
        ("When was Sorrel Bridge opened by the minister of transport?", "4 October 1972"),
        ("How long was the detour through Upper Sorrel?", "38 kilometres"),
        ("How wide is the deck of Sorrel Bridge?", "11.2 metres"),
        ("Until when were tolls taken on Sorrel Bridge?", "1996"),
        ("Who was the engineer of the county who asked for more maintenance money?", "Douglas Mair"),
    ],
    "sorrel-bridge/inspection-2018": [
        ("Who was the lead inspector of Sorrel Bridge in 2018?", "Olwen Price"),
        ("Which company inspected Sorrel Bridge in June 2018?", "Tern & Makepeace"),
        ("When does the paint of the steel spans date from?", "1994"),
        ("How long is the longest fatigue crack?", "64 millimetres"),
        ("What was the overall rating of the bridge in 2012?", "71"),
    ],
    "sorrel-bridge/closure-report-2021": [
        ("What did a walker hear?", "a loud bang"),
        ("How long was the crack in the bottom plate of the southern main span?", "1.9 metres"),
        ("At what time was Sorrel Bridge closed?", "17:20"),
        ("How much does the closure cost the users each day?", "61,000 pounds"),
        ("On which date does a passenger ferry begin?", "30 August"),
    ],
    "sorrel-bridge/repair-and-reopening-2022": [
        ("On which date was the bridge opened again to cars?", "14 March 2022"),
        ("Which company did the work of repair on Sorrel Bridge?", "Garrick Steel"),
        ("How many bolts fastened the plates?", "2,180"),
        ("How much did the government pay for the repair?", "6.0 million pounds"),
    ],
    "harrow-observatory/foundation": [
        ("In what trade had Josiah Penhallow made a fortune?", "tin"),
        ("When was the observatory on Harrow Hill opened?", "21 June 1874"),
        ("Who became director of the observatory but preferred fishing?", "Edmund Penhallow"),
        ("Who made the glass of the refractor?", "the brothers Feil"),
    ],
    "harrow-observatory/lydia-trew": [
        ("Where was Lydia Trew born?", "Carrick"),
        ("How many pairs of double stars did Lydia Trew measure?", "2,317"),
        ("Which prize did the catalogue of Lydia Trew win?", "silver medal"),
        ("When did Lydia Trew discover a comet?", "9 October 1892"),
        ("When was the cottage pulled down?", "1936"),
        ("Who was the last pupil of Lydia Trew?", "Ruth Amsel"),
    ],
    "harrow-observatory/ruth-amsel": [
        ("From which city did Ruth Amsel come to Carrick?", "Breslau"),
        ("In which city was Ruth Amsel offered a post that she refused?", "Chicago"),
        ("What did Ruth Amsel work on in the war?", "radar"),
        ("How much did each of the two dishes bought from the army cost?", "35 pounds"),
        ("What is the new site of the observatory called since 1990?", "Amsel Station"),
    ],
    "harrow-observatory/twelve-inch-refractor": [
        ("What did Thomas Orme make before the telescope?", "mine pumps"),
        ("In which city was the scratched glass polished again?", "Dublin"),
        ("Where was the glass hidden from 1940 to 1945?", "tin mine"),
        ("What did the university fit in 1927?", "spectrograph"),
        ("When was the telescope retired from research?", "1964"),
    ],
    "harrow-observatory/amsel-station-annual-report-2022": [
        ("How many clear nights did the night assistants record in 2022?", "231"),
        ("Who finished a new orbit of Trew 88?", "Samir Haddad"),
        ("What is the period of Trew 88?", "18.62 years"),
    ],
    "velm-river/course-and-catchment": [
        ("How long is the River Velm?", "412 kilometres"),
        ("Which tributary joins the Velm from the left at Tolmen?", "Ashna"),
        ("Where does the Little Velm join the Velm?", "Brod"),
        ("In which year were the embankments below Kandle built?", "1911"),
        ("Which rapids stop all navigation above Brod?", "Hask"),
    ],
    "velm-river/flood-of-1987": [
        ("Where did the left embankment break?", "Linden Mill"),
        ("Who led the joint commission on the flood?", "Anton Feld"),
    ],
    "velm-river/return-of-the-sturgeon": [
        ("Which biologist found spawning sturgeon in the Sere?", "Irena Vasko"),
        ("How much sturgeon did the fishermen land in 1930?", "41 tonnes"),
        ("Where was a hatchery built in 2014?", "Strom"),
    ],
    "velm-river/tolmen-dam": [
        ("When was the dam at Tolmen finished?", "1968"),
        ("How high is the wall of the dam at Tolmen?", "96 metres"),
        ("How many lives did building the dam cost?", "23"),
        ("Who was the engineer in charge of the dam?", "Milena Dorsh"),
    ],
    "velm-river/treaty-of-1991": [
        ("In which town was the Velm treaty signed?", "Brod"),
        ("How much water must leave the dam at all times?", "25 cubic metres a second"),
        ("How much was Sarnia ordered to pay?", "1.2 million crowns"),
    ],
    "skerrow-island/island-and-station": [
        ("What is the highest point of Skerrow called?", "Stack of Anvil"),
        ("Who founded the field station on Skerrow?", "Eleanor Strand"),
        ("From which ship did rats come ashore in 1932?", "Mabel Rose"),
        ("Who is the skipper of the boat from Portlorne?", "Ewan Rae"),
    ],
    "skerrow-island/rat-eradication-2009": [
        ("Who led the team that removed the rats of Skerrow?", "Tomas Hale"),
        ("How much did the removal of the rats cost?", "412,000 pounds"),
        ("Which birds were kept in aviaries until the spring?", "Ravens"),
        ("Who is the warden of the station?", "Isla Rae"),
        ("In which country had the method been proved?", "New Zealand"),
    ],
    "skerrow-island/sand-eels-and-kittiwakes": [
        ("Who leads the station since 2019?", "Wen Li"),
        ("Which fish do parents bring when sand eels are lacking?", "snake pipefish"),
        ("When was the fishery for sand eels on the Anvil Bank closed?", "spring of 2020"),
    ],
    "skerrow-island/seabird-counts-2010-2024": [
        ("In which year did the first pair of shearwaters return?", "2013"),
        ("Which disease reached the island in June 2022?", "Avian influenza"),
        ("How many dead guillemots were picked up?", "1,870"),
    ],
}


def pairs(text: str) -> list[list[str]]:
    """The paragraphs of running text of a Markdown file, two by two; an odd last one again with the one before it."""
    blocks = text.strip().split("\n\n")
    plain = [" ".join(block.replace("**", "").split()) for block in blocks if not block.startswith(("|", "#", "1. D"))]
    plain = [block for block in plain if len(block.split()) >= FEWEST_WORDS]
    starts = [min(start, len(plain) - 2) for start in range(0, len(plain), 2)]
    return [plain[start : start + 2] for start in starts if start >= 0]


def main() -> None:
    held_out_folders = {name.partition("/")[0] for name in QUESTIONS}
    clusters, questions = [], []
    for path in sorted(SOURCE.glob("*/*.md")):
        name = f"{path.parent.name}/{path.stem}"
        found = pairs(path.read_text(encoding="utf-8"))
        if path.parent.name not in held_out_folders:
            clusters += [{"cluster_id": f"{name}-{i}", "documents": pair} for i, pair in enumerate(found, start=1)]
            continue
        for number, (question, answer) in enumerate(QUESTIONS[name], start=1):
            documents = next((pair for pair in found if any(answer in text for text in pair)), None)
            if documents is None:
                raise ValueError(f"{answer!r} ({question}) does not stand in {name}")
            row = {"id": f"{name}-{number}", "task": "doc_general_qa", "question": question, "answer": answer}
            questions.append(row | {"documents": documents})
    for file, rows in (("documents.jsonl", clusters), ("heldout.jsonl", questions)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / file).write_text(lines, encoding="utf-8")
    words = [len(text.split()) for cluster in clusters for text in cluster["documents"]]
    print(f"{len(clusters)} clusters of two documents of {sum(words) // len(words)} words on average")
    print(f"{len(questions)} held-out questions")


if __name__ == "__main__":
    main()
