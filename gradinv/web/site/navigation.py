"""The script that the server runs for every visitor: set-up and navigation.

Not beside the folder `pages`: Streamlit takes one of that name beside its script for pages of its own kind.
"""

from __future__ import annotations

import streamlit as st

from gradinv.paths import ASSETS
from gradinv.web.pages import batch, defences, how, labels, layers, live, replay
from gradinv.web.parts import tour
from gradinv.web.site import address

# Before the navigation, whose icons the browser would otherwise fetch from the internet for its tab.
st.set_page_config(
    page_icon=str(ASSETS / "icon.svg"),
    layout="wide",
    menu_items={
        "About": "gradinv inverts shared gradients into the pictures behind them. It is made to show a risk, with "
        "openly licensed pictures or your own."
    },
)
st.logo(str(ASSETS / "icon.svg"), size="large")
pages = [
    st.Page(live.page, title="Live", icon=":material/play_circle:", url_path="live", default=True),
    st.Page(replay.page, title="Replay", icon=":material/movie:", url_path="replay"),
    st.Page(labels.page, title="Labels", icon=":material/label:", url_path="labels"),
    st.Page(batch.page, title="Who was in the batch?", icon=":material/person_search:", url_path="batch"),
    st.Page(layers.page, title="Layer by layer", icon=":material/layers:", url_path="layers"),
    st.Page(defences.page, title="Defences", icon=":material/shield:", url_path="defences"),
    st.Page(how.page, title="How it works", icon=":material/menu_book:", url_path="how"),
]
page = st.navigation(pages, position="top")
st.set_page_config(page_title=f"{page.title} · gradinv")
address.honour(page.url_path or "live")
tour.banner(pages, page)
page.run()
