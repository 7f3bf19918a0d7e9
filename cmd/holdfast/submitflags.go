package main

import (
	"flag"
	"slices"
	"time"

	"github.com/google/uuid"

	"holdfast/bridge/wire"
	"holdfast/devices"
)

// submitFlags are the flags of the commands that send a command to a device.
type submitFlags struct {
	fs                              *flag.FlagSet
	submit                          wire.Submit
	payload, payloadFile, notBefore *string
	ttl, execution                  *time.Duration
}

func submitFlagsIn(fs *flag.FlagSet) *submitFlags {
	f := &submitFlags{
		fs:          fs,
		payload:     fs.String("payload", "", "what the device is told, `TEXT`"),
		payloadFile: fs.String("payload-file", "", "the same from a `FILE`; - is stdin"),
		ttl:         durationFlag(fs, "ttl", 0, "it is for nothing if it is not delivered within `D`, such as 90s or 12h (none: 24h)"),
		notBefore:   fs.String("not-before", "", "it waits until `TIME`: 2026-03-01T06:00:00Z, or a duration from now"),
		execution:   durationFlag(fs, "execution-timeout", 0, "the device has `D` from the delivery to the outcome (none: 5m)"),
	}
	s := &f.submit
	fs.StringVar(&s.ContentType, "content-type", "", "what the payload is, `TYPE`, such as application/json")
	fs.StringVar(&s.ID, "id", "", "the command's `ID` (none: one is made)")
	fs.IntVar(&s.MaxAttempts, "max-attempts", 0, "it is given up after `N` sends without an acknowledgement (none: 10)")
	fs.BoolVar(&s.OneWay, "one-way", false, "the device acknowledges it and says nothing more")
	fs.BoolVar(&s.Urgent, "urgent", false, "it overtakes those that wait for the same device")
	fs.StringVar(&s.SupersedeKey, "supersede-key", "", "it takes the place of those with this `KEY` that are not delivered")
	fs.StringVar(&s.Feedback, "feedback", "", "what of it is told upstream, `none|negative|positive|full` (none: full)")
	return f
}

// request is what the flags ask for: the command name. Without --id it gets one of ours, so that asking again after a lost
// answer is no second command.
func (f *submitFlags) request(name string) (s wire.Submit, err error) {
	s = f.submit
	s.Name = name
	s.TTL, s.HasTTL, s.ExecutionTimeout = wire.Duration(*f.ttl), isSet(f.fs, "ttl"), wire.Duration(*f.execution)
	if s.NotBefore.Time, err = momentOf(*f.notBefore, time.Now()); err != nil {
		return s, err
	}
	switch {
	case isSet(f.fs, "payload") && isSet(f.fs, "payload-file"):
		return s, usagef("--payload and --payload-file exclude each other")
	case s.HasTTL && s.TTL <= 0:
		return s, usagef("--ttl %v is over before it begins", s.TTL)
	case isSet(f.fs, "execution-timeout") && s.ExecutionTimeout <= 0:
		return s, usagef("--execution-timeout must be longer than 0")
	case s.Feedback != "" && !slices.Contains([]string{"none", "negative", "positive", "full"}, s.Feedback):
		return s, usagef("--feedback is none, negative, positive or full")
	case isSet(f.fs, "payload-file"):
		if s.Payload, err = readLimited(*f.payloadFile, devices.MaxCommandPayload); err != nil {
			return s, err
		}
	default:
		s.Payload = []byte(*f.payload)
	}
	if s.ID == "" {
		id, err := uuid.NewV7()
		if err != nil {
			return s, err
		}
		s.ID = id.String()
	}
	if b, err := wire.EncodeSubmit(&s); err != nil {
		return s, usageError{err.Error()}
	} else if _, err := wire.DecodeSubmit(b); err != nil { // what a gateway would say
		return s, usageError{err.Error()}
	}
	return s, nil
}

// isSet says whether a flag was given, be it as nothing.
func isSet(fs *flag.FlagSet, name string) bool {
	set := false
	fs.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}
