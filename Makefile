# Each target is the command of dev.py; arguments go there: python3 dev.py test -k cpo
COMMANDS := lint format types docs stubs test demo

.PHONY: $(COMMANDS) ci
$(COMMANDS):
	python3 dev.py $@

ci:
	.ci/run
