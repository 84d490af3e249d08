{{- define "affinity.labels" -}}
app.kubernetes.io/name: affinity
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
