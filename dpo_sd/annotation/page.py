"""The script that Streamlit runs at every visit and every vote."""

from dpo_sd.annotation import views

views.show()
