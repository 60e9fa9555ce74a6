"""The server, for `streamlit run app.py`. What it shows is gradinv/web/site/navigation.py."""

from __future__ import annotations

import streamlit as st

from gradinv.web.host import server

app = st.App("gradinv/web/site/navigation.py", middleware=server.middleware(), lifespan=server.ready)
