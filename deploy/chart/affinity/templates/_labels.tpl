{{- define "affinity.labels" -}}
app.kubernetes.io/name: affinity
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- /* The host of probes: empty if the agent listens at all addresses, including the node's. */ -}}
{{- define "affinity.probedHost" -}}
{{- $host := .Values.metricsAddress | trimPrefix "[" | trimSuffix "]" -}}
{{- if not (has $host (list "::" "0.0.0.0")) -}}
{{- $host -}}
{{- end -}}
{{- end -}}
