"""The pages. With app.py the only place that imports Streamlit."""
