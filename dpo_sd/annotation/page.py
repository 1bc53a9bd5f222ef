"""The script that Streamlit runs anew for every visit and every vote."""

from dpo_sd.annotation import views

views.show()
