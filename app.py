"""The server, for `streamlit run app.py`. What it shows is gradinv/web/pages.py."""

from __future__ import annotations

import streamlit as st

from gradinv.web import server

app = st.App("gradinv/web/pages.py", middleware=server.middleware(), lifespan=server.ready)
